"""What commands are made of: how one is added, how it fails, and the values that several take."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - it has no public name
else:
    Commands = object

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class CommandError(Exception):
    """A command cannot do what it was asked to. The message is for the person who typed it."""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    about: str,
    examples: str,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
    """Add the command `name`, which calls `run`; `examples` are command lines, one a line. Return its parser.

    What `run` is given has `usage_error` too, to be called with what is wrong between arguments.
    """
    lines = examples.splitlines()
    epilog = "\n  ".join(["example:" if len(lines) == 1 else "examples:", *lines])
    parser = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=epilog,
        parents=list(parents),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, usage_error=parser.error)
    return parser


def reason_of(error: Exception) -> str:
    """Return what an error says, in one line; the name of a file that cannot be read or written is not in it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def sentence_of(error: Exception) -> str:
    """Return what an error says, in one line, after the name of the file if it is about one."""
    name = error.filename if isinstance(error, OSError) else None
    return reason_of(error) if name is None else f"{name}: {reason_of(error)}"


def positive(text: str) -> int:
    """Return a number that is 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def natural(text: str) -> int:
    """Return a number that is 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def picture_path(text: str) -> Path:
    """Return the path of a picture to write, in a format that its suffix names."""
    path = Path(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a picture's name: {', '.join(PICTURE_SUFFIXES)}")
    return path
