"""`sam embed`."""

import argparse

from service.client import SegmentError
from service.commands.command import CommandError, Commands, add_command, reason_of
from service.commands.connection import connect, connection_options
from service.commands.outputs import say

EXAMPLES = """sam embed photo.jpg
sam embed *.jpg
sam embed photo.jpg --image-id cat-1"""


def add_embed_command(commands: Commands) -> None:
    """Add `embed`."""
    about = "Have images encoded, so that prompts on them are answered at once."
    parser = add_command(commands, "embed", embed_images, about, EXAMPLES, [connection_options()])
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--image-id", metavar="ID", help="its name, if it is one image (default: its content digest)")


def embed_images(arguments: argparse.Namespace) -> None:
    """Upload each image and print its name, size, and where its embedding came from; go on after a failure."""
    if arguments.image_id and len(arguments.images) > 1:
        arguments.usage_error("--image-id names one image, and several are given")
    failures = 0
    with connect(arguments) as client:
        for image in arguments.images:
            try:
                picture = client.image(image, image_id=arguments.image_id).picture
            except (SegmentError, OSError) as error:
                failures += 1
                say(f"error: {image}: {reason_of(error)}")
            else:
                height, width = picture.size
                print(f"{image}\t{picture.image_id}\t{width}x{height}\t{picture.cache}")
    if failures:
        raise CommandError(f"{failures} of {len(arguments.images)} images failed")
