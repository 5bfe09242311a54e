"""The `sam` command line: its commands, and how they end."""

import argparse
import os
import sys
from collections.abc import Sequence

from service.client import SegmentError
from service.commands.annotate import add_annotate_command
from service.commands.cache import add_cache_commands
from service.commands.command import CommandError, sentence_of
from service.commands.embed import add_embed_command
from service.commands.everything import add_everything_command
from service.commands.health import add_health_command
from service.commands.outputs import say
from service.commands.segment import add_overlay_command, add_segment_command
from service.picture import trust_own_limits

FAILED, INTERRUPTED = 1, 130
EPILOG = """examples:
  sam segment photo.jpg --point 320,240 -o mask.png
  sam annotate photos -o annotations

SAM_TARGET and SAM_API_KEY say where the service is and who you are. Exit codes: 0 done, 1 failed, 2 wrong usage."""


def run_command(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`, by default the process's own arguments; return the exit code."""
    arguments = make_parser().parse_args(argv)
    trust_own_limits()
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `sam cache ls | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (CommandError, SegmentError, OSError) as error:
        say(f"error: {sentence_of(error)}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="sam",
        description="Segment Anything from the command line.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        add_embed_command,
        add_segment_command,
        add_overlay_command,
        add_everything_command,
        add_annotate_command,
        add_cache_commands,
        add_health_command,
    ):
        add(commands)
    return parser
