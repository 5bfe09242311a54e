"""Our scaling rules beside what is usual: `python -m benchmarks.autoscale` prints the table and draws the plot.

Drives the rules of k8s/ (benchmarks/scaler.py) with a day's load, a burst and a batch job (benchmarks/cluster.py).
A simulation: its rates and cold starts are assumptions, named in `World`; what it compares are the rules.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.cluster import SYNC_S, Outcome, Pod, World, simulate
from benchmarks.scaler import RULES, Autoscaler, Direction, Policy, from_average_value, read_scaled_object

OUTPUT = Path(__file__).parent.parent / "docs" / "images" / "autoscale.svg"
USUAL_CPU_TARGET = 0.7
TUNED_CPU_TARGET = 0.08  # seven tenths of the CPU that a gateway takes whose GPU is full, with this load's part of hits
DEFAULT_UP = Direction(0.0, (Policy("Percent", 100, 15.0), Policy("Pods", 4, 15.0)))  # of the HPA itself
DEFAULT_DOWN = Direction(300.0, (Policy("Percent", 100, 15.0),))

Scale = Callable[[float, list[Pod], int], int]


def by_our_rules() -> Scale:
    """Return what components/keda does."""
    scaler, thresholds = read_scaled_object()

    def scale(now_s: float, ready: list[Pod], wanted: int) -> int:
        metrics = [pod.metrics for pod in ready]
        totals = {name: rule(metrics, now_s) for name, rule in RULES.items()}
        advice = max(from_average_value(totals[name], threshold, wanted) for name, threshold in thresholds.items())
        return scaler.step(now_s, wanted, advice)

    return scale


def by_cpu(target: float) -> Scale:
    """Return what an HPA on the gateway's CPU does, with its default behaviour and our bounds."""
    ours, _ = read_scaled_object()
    scaler = Autoscaler(ours.least, ours.most, DEFAULT_UP, DEFAULT_DOWN)

    def scale(now_s: float, ready: list[Pod], wanted: int) -> int:
        used = sum(pod.metrics.cpu for pod in ready)
        return scaler.step(now_s, wanted, from_average_value(used, target, wanted))

    return scale


def fixed(_: float, __: list[Pod], wanted: int) -> int:
    """Leave the number of pods as it is."""
    return wanted


def main() -> None:
    """Simulate, print, draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoscale", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--hours", type=float, default=24.0, help="length of the day")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="where the plot goes (default: the README's)")
    parser.add_argument("--batch", type=int, default=World.batch_images_per_s, help="images a second of the batch job")
    arguments = parser.parse_args()
    world = replace(World(), hours=arguments.hours, batch_images_per_s=arguments.batch)
    runs: dict[str, tuple[int, Scale]] = {
        "our rules (components/keda)": (2, by_our_rules()),
        "CPU of the gateway, 70 %": (2, by_cpu(USUAL_CPU_TARGET)),
        "CPU of the gateway, 8 %": (2, by_cpu(TUNED_CPU_TARGET)),
        "fixed, 4 pods": (4, fixed),
        "fixed, 12 pods": (12, fixed),
    }
    outcomes = {name: simulate(world, pods, scale) for name, (pods, scale) in runs.items()}
    millions = next(iter(outcomes.values())).requests / 1e6
    print(f"{world.hours:g} h, {millions:.2f} million requests, burst x{world.burst_factor:g}\n")
    print("| scaled on | p50 ms | p99 ms | refused | GPU hours | hits | most pods |\n|---|---|---|---|---|---|---|")
    for name, outcome in outcomes.items():
        print(
            f"| {name} | {1e3 * outcome.wait_s(0.5):.0f} | {1e3 * outcome.wait_s(0.99):.0f} "
            f"| {outcome.refused / outcome.requests:.2%} | {outcome.gpu_hours:.0f} "
            f"| {outcome.hits / outcome.requests:.0%} | {max(row[3] for row in outcome.timeline)} |"
        )
    draw(outcomes, arguments.output)


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    """Draw requests, pods and refusals over the day, a point each minute."""
    import matplotlib as mpl  # noqa: PLC0415 - only for the plot
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 7))
    load, pods, refused = figure.subplots(3, 1, sharex=True)
    for index, (name, outcome) in enumerate(outcomes.items()):
        rows = outcome.timeline[:: round(60 / SYNC_S)]
        hours = [row[0] / 3600 for row in rows]
        if index == 0:
            load.plot(hours, [row[1] for row in rows], color="black", linewidth=0.6)
        pods.step(hours, [row[3] for row in rows], label=name, linewidth=2 if index == 0 else 1)
        refused.plot(hours, [row[4] for row in rows], linewidth=2 if index == 0 else 1)
    refused.set_yscale("symlog", linthresh=100)
    for axes, title in ((load, "requests/s"), (pods, "pods"), (refused, "refused so far")):
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    pods.legend(fontsize="small")
    refused.set_xlabel("hours")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "autoscale"}):  # the same day, the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
