"""`python -m export.tiny train|evaluate`: train sam-tiny, or print the table of its model card."""

import argparse
from pathlib import Path

import torch

from export.tiny.evaluate import coin_figures, scene_figures, table_rows
from export.tiny.network import load_model
from export.tiny.train import Recipe, train

CHECKPOINT = Path(__file__).parent / "sam-tiny.safetensors"


def main() -> None:
    """Parse the command line and run one of the two commands."""
    parser = argparse.ArgumentParser(prog="python -m export.tiny", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for torch")
    commands = parser.add_subparsers(required=True, dest="command")
    training = commands.add_parser("train", help="train, or go on training")
    training.add_argument("--folder", type=Path, default=Path("out/tiny"), help="state, weights and loss curve")
    training.add_argument("--steps", type=int, default=60_000, help="length of the whole schedule")
    training.add_argument("--mixed-from", type=int, default=10_000, help="from here every fourth batch is full size")
    training.add_argument("--full-size-from", type=int, default=50_000, help="from here all are")
    training.add_argument("--seed", type=int, default=1)
    training.add_argument("--start", type=Path, help="begin with this checkpoint, not from scratch; give another seed")
    training.add_argument("--peak-rate", type=float, default=Recipe.peak_rate, help="highest learning rate")
    evaluation = commands.add_parser("evaluate", help="print the figures as a table")
    evaluation.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    evaluation.add_argument("--scenes", type=int, default=100, help="how many held-out scenes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.command == "evaluate":
        model = load_model(arguments.checkpoint)
        for row in table_rows(scene_figures(model, arguments.scenes) + coin_figures(model)):
            print(row)
        return
    recipe = Recipe(
        arguments.steps,
        arguments.mixed_from,
        arguments.full_size_from,
        peak_rate=arguments.peak_rate,
        seed=arguments.seed,
        start=arguments.start,
    )
    train(recipe, arguments.folder)


if __name__ == "__main__":
    main()
