"""`sam segment` and `sam overlay`."""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from service.client import Mask, Picture
from service.commands.canvas import Canvas
from service.commands.command import CommandError, Commands, add_command, picture_path
from service.commands.connection import connect, connection_options
from service.commands.outputs import STDOUT, write_json, write_picture
from service.commands.prompts import check_prompt, masks_of_prompt, prompt_options

SEGMENT_EXAMPLES = """sam segment photo.jpg --point 320,240
sam segment photo.jpg --point 320,240 --point 10,12,0 --box 50,40,400,380 -o mask.png
sam segment photo.jpg --point 320,240 --multimask -o masks.json"""
OVERLAY_EXAMPLE = "sam overlay photo.jpg --point 320,240 -o overlay.png"


def add_segment_command(commands: Commands) -> None:
    """Add `segment`."""
    about = "Turn points and a box into a mask."
    parents = [prompt_options(), connection_options()]
    parser = add_command(commands, "segment", segment_image, about, SEGMENT_EXAMPLES, parents)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "--multimask",
        action=argparse.BooleanOptionalAction,
        help="three candidates, or the single-mask output (default: the best candidate for a lone point, else the "
        "single-mask output)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=mask_path,
        default=STDOUT,
        metavar="FILE",
        help="mask.png: the best mask, white on black; mask.json: all, as COCO run lengths with scores; -: JSON on the "
        "standard output (default)",
    )


def add_overlay_command(commands: Commands) -> None:
    """Add `overlay`."""
    about = "Draw the mask of points and a box over the picture."
    parents = [prompt_options(), connection_options()]
    parser = add_command(commands, "overlay", overlay_image, about, OVERLAY_EXAMPLE, parents)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-o", "--output", type=picture_path, required=True, metavar="PICTURE")


def segment_image(arguments: argparse.Namespace) -> None:
    """Write the masks of a prompt."""
    check_prompt(arguments)
    with connect(arguments) as client:
        image = client.image(arguments.image)
        masks = masks_of_prompt(image, arguments, multimask=arguments.multimask)
    if arguments.output.suffix.lower() == ".png":
        write_picture(arguments.output, Image.fromarray(masks[0].array))
    else:
        write_json(arguments.output, json_from_masks(image.picture, masks))


def overlay_image(arguments: argparse.Namespace) -> None:
    """Write the picture with the best mask of a prompt, and the prompt, over it."""
    check_prompt(arguments)
    with connect(arguments) as client:
        image = client.image(arguments.image)
        best, *_ = masks_of_prompt(image, arguments, multimask=None)
    if not best.area:
        raise CommandError("the mask is empty")
    canvas = Canvas(image.picture.data)
    canvas.fill(best.array)
    write_picture(arguments.output, canvas.picture(arguments.points, arguments.box))


def json_from_masks(picture: Picture, masks: list[Mask]) -> dict[str, Any]:
    """Return what `mask.json` says: the names are those of the HTTP API."""
    return {
        "image_id": picture.image_id,
        "size": list(picture.size),
        "model": picture.model,
        "masks": [
            {
                "rle": mask.rle,
                "score": mask.score,
                "stability": mask.stability,
                "bbox": list(mask.bbox),
                "area": mask.area,
            }
            for mask in masks
        ],
    }


def mask_path(text: str) -> Path:
    """Return where a mask goes: a .png, a .json, or "-"."""
    path = Path(text)
    if path != STDOUT and path.suffix.lower() not in (".png", ".json"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a .png, nor a .json, nor -")
    return path
