"""The prompt of a command line: points and a box."""

import argparse
import re

from service.client import ImageHandle, Mask
from service.commands.command import natural

NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
POINT = re.compile(rf"{NUMBER},{NUMBER}(?:,([01]))?")
BOX = re.compile(",".join([NUMBER] * 4))


def prompt_options() -> argparse.ArgumentParser:
    """Return the options that make up a prompt."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("prompt", "pixels of the image as a person sees it, x right and y down")
    group.add_argument(
        "--point",
        dest="points",
        type=point,
        action="append",
        default=[],
        metavar="X,Y[,LABEL]",
        help="on the thing (label 1, the default) or beside it (0); repeatable",
    )
    group.add_argument("--box", type=box, metavar="X0,Y0,X1,Y1", help="around the thing")
    group.add_argument(
        "--min-region-area",
        type=natural,
        default=0,
        metavar="PIXELS",
        help="fill holes and drop islands that are smaller (default: %(default)s, none)",
    )
    return parser


def masks_of_prompt(image: ImageHandle, arguments: argparse.Namespace, *, multimask: bool | None) -> list[Mask]:
    """Return the masks of the prompt in `arguments`, best first."""
    return image.segment(
        points=arguments.points, box=arguments.box, multimask=multimask, min_region_area=arguments.min_region_area
    )


def check_prompt(arguments: argparse.Namespace) -> None:
    """End with the usage if there is no prompt."""
    if not arguments.points and arguments.box is None:
        arguments.usage_error("give a prompt: --point, --box or both")


def point(text: str) -> tuple[float, float, int]:
    """Return (x, y, label)."""
    found = POINT.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a point: x,y or x,y,label with label 1 or 0")
    return (float(found[1]), float(found[2]), int(found[3] or 1))


def box(text: str) -> tuple[float, float, float, float]:
    """Return (x0, y0, x1, y1)."""
    found = BOX.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a box: x0,y0,x1,y1")
    x0, y0, x1, y1 = map(float, found.groups())
    return (x0, y0, x1, y1)
