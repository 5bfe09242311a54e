"""The entry point of `sam`."""

import os
import sys


def main() -> int:
    """Run the command that the process's arguments name; return the exit code."""
    # gRPC reads it when it is imported: its own lines on stderr tell nothing that the error in our words does not.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from service.commands.program import run_command  # noqa: PLC0415

    return run_command()


if __name__ == "__main__":
    sys.exit(main())
