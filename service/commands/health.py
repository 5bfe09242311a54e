"""`sam health`."""

import argparse

from service.commands.command import CommandError, Commands, add_command
from service.commands.connection import connect, connection_options

EXAMPLE = "sam health --target 127.0.0.1:50051"


def add_health_command(commands: Commands) -> None:
    """Add `health`."""
    about = "Say whether the service can answer prompts, and with which model."
    add_command(commands, "health", print_health, about, EXAMPLE, [connection_options(timeout_s=5.0)])


def print_health(arguments: argparse.Namespace) -> None:
    """Print readiness and the model's facts, after one look."""
    with connect(arguments, max_attempts=1) as client:
        if not client.is_ready():
            raise CommandError(f"{arguments.target} is not ready")
        model = client.model()
    print(f"{arguments.target} is ready")
    print(f"model      {model.name}@{model.digest}")
    print(f"input      {model.input_size} pixels at the longest side")
    print(f"embedding  {' x '.join(map(str, model.embedding_shape))}")
    print(f"limits     {model.max_prompts} prompts a request, {model.max_points} points a prompt")
