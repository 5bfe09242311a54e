"""`python -m export.tiny train|evaluate`: train sam-tiny, or print the table of its model card."""

import argparse
import warnings
from pathlib import Path

import torch

from export.tiny.train import Recipe, train


def main() -> None:
    """Parse the command line and run one of the two commands."""
    parser = argparse.ArgumentParser(prog="python -m export.tiny", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for torch")
    commands = parser.add_subparsers(required=True, dest="command")
    training = commands.add_parser("train", help="train, or go on training")
    training.add_argument("--folder", type=Path, default=Path("out/tiny"), help="state, weights and loss curve")
    training.add_argument("--steps", type=int, default=60_000, help="length of the whole schedule")
    training.add_argument("--full-size-from", type=int, default=45_000, help="the step from which images are full size")
    training.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # DataLoader announces a deprecation inside torch itself; nothing here can change it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    train(Recipe(arguments.steps, arguments.full_size_from, seed=arguments.seed), arguments.folder)


if __name__ == "__main__":
    main()
