"""`sam everything`, and the parameters that `sam annotate` shares."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_type_hints

from service.client import EverythingParameters, Picture, Record
from service.commands.canvas import Canvas, colours
from service.commands.command import Commands, add_command, natural, picture_path
from service.commands.connection import connect, connection_options
from service.commands.outputs import write_json, write_picture
from service.commands.progress import Bar
from service.rle import binary_from_rle_counts

EXAMPLES = """sam everything photo.jpg -o records.json
sam everything photo.jpg -o records.json --overlay overlay.png --points-per-side 16"""
EVERYTHING_TIMEOUT_S = 600.0  # a thousand points and more; the service has a bound of its own
FLAGS = {name: kind for name, kind in get_type_hints(EverythingParameters).items() if kind in (int, float)}


def everything_options() -> argparse.ArgumentParser:
    """Return an option for each parameter of everything-mode that is a number."""
    parser = argparse.ArgumentParser(add_help=False)
    about = "those of the original's SamAutomaticMaskGenerator, with its defaults"
    group = parser.add_argument_group("parameters", about)
    for name, kind in FLAGS.items():
        flag, value = f"--{name.replace('_', '-')}", "N" if kind is int else "X"
        group.add_argument(flag, type=natural if kind is int else float, metavar=value)
    return parser


def parameters_of(arguments: argparse.Namespace) -> EverythingParameters:
    """Return the parameters that were given."""
    given = {name: getattr(arguments, name) for name in FLAGS if getattr(arguments, name) is not None}
    return cast("EverythingParameters", given)  # FLAGS are its names and types


def add_everything_command(commands: Commands) -> None:
    """Add `everything`."""
    about = "Find a mask for everything in a picture."
    parents = [everything_options(), connection_options(EVERYTHING_TIMEOUT_S)]
    parser = add_command(commands, "everything", segment_everything, about, EXAMPLES, parents)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="JSON",
        help="where the records go, as SA-1B has them; -: the standard output",
    )
    parser.add_argument("--overlay", type=picture_path, metavar="PICTURE", help="draw the masks over the picture, too")


def segment_everything(arguments: argparse.Namespace) -> None:
    """Write the records of a picture."""
    with connect(arguments) as client, Bar("points") as bar:
        image = client.image(arguments.image)
        records = list(
            image.everything(
                on_progress=lambda progress: bar.show(progress.batches, progress.batches_in_all),
                **parameters_of(arguments),
            )
        )
    write_json(arguments.output, annotations_of(image.picture, Path(arguments.image).name, records))
    if arguments.overlay:
        canvas = Canvas(image.picture.data)
        draw_records(canvas, records)
        write_picture(arguments.overlay, canvas.picture())


def draw_records(canvas: Canvas, records: Sequence[Record]) -> None:
    """Fill each record's mask with a colour of its own, the largest first; one mask is decoded at a time."""
    largest_first = sorted(records, key=lambda record: -record.area)
    for record, colour in zip(largest_first, colours(len(records)), strict=True):
        canvas.fill(binary_from_rle_counts(record.counts, record.size), colour)  # `array` would keep them all


def annotations_of(picture: Picture, file_name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Return the records as one of SA-1B's files has them."""
    height, width = picture.size
    return {
        "image": {"image_id": picture.digest, "width": width, "height": height, "file_name": file_name},
        "annotations": [{"id": number, **record.annotation} for number, record in enumerate(records, 1)],
    }
