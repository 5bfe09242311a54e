"""`sam annotate`: everything-mode on a folder of pictures, which can be interrupted and taken up again."""

import argparse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from service.client import EverythingParameters, SegmentClient, SegmentError
from service.commands.command import PICTURE_SUFFIXES, CommandError, Commands, add_command, positive, reason_of
from service.commands.connection import connect, connection_options
from service.commands.everything import EVERYTHING_TIMEOUT_S, annotations_of, everything_options, parameters_of
from service.commands.outputs import say, write_json
from service.commands.progress import Bar

EXAMPLES = """sam annotate photos -o annotations
sam annotate photos -o annotations --jobs 4 --points-per-side 16"""


@dataclass(frozen=True, slots=True)
class Task:
    """A picture to annotate and where its records go."""

    image: Path
    output: Path


def add_annotate_command(commands: Commands) -> None:
    """Add `annotate`."""
    about = "Find a mask for everything in each picture of a folder: one JSON file each, as SA-1B has them."
    parents = [everything_options(), connection_options(EVERYTHING_TIMEOUT_S)]
    parser = add_command(commands, "annotate", annotate_folder, about, EXAMPLES, parents)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="its .jpg, .jpeg, .png and .webp files")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="made if it is not there; pictures that have their file in it already are skipped",
    )
    parser.add_argument(
        "--jobs", type=positive, default=2, metavar="N", help="pictures worked on at once (default: %(default)s)"
    )


def annotate_folder(arguments: argparse.Namespace) -> None:
    """Annotate what has not been; say at the end what failed, and why."""
    tasks = tasks_of(arguments.folder, arguments.output)
    left = [task for task in tasks if not task.output.exists()]
    arguments.output.mkdir(parents=True, exist_ok=True)
    failures: list[tuple[Path, Exception]] = []
    with connect(arguments) as client, Bar("pictures") as bar:
        if left:
            client.model()  # one error for all, if nobody is there
        bar.show(0, len(left))
        for done, (task, error) in enumerate(results_of(client, left, parameters_of(arguments), arguments.jobs), 1):
            if error is not None:
                failures.append((task.image, error))
            bar.show(done, len(left), task.image.name)
    say(f"{len(left) - len(failures)} annotated, {len(tasks) - len(left)} skipped, {len(failures)} failed")
    for image, error in sorted(failures, key=lambda failure: failure[0]):
        say(f"{image.name}: {getattr(error, 'reason', 'unreadable')}: {reason_of(error)}")
    if failures:
        raise CommandError(f"{len(failures)} of {len(left)} pictures failed")


def tasks_of(folder: Path, output: Path) -> list[Task]:
    """Return the pictures of `folder` by name; those that differ in their suffix alone keep it in the output's name.

    Raises:
        CommandError: there is none, or two of them have one output.
    """
    if not folder.is_dir():
        raise CommandError(f"{folder} is not a folder")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if not images:
        raise CommandError(f"{folder} holds no pictures: {', '.join(PICTURE_SUFFIXES)}")
    stems = Counter(image.stem for image in images)
    names = [image.stem if stems[image.stem] == 1 else image.name for image in images]
    if len(set(names)) < len(names):
        name = Counter(names).most_common(1)[0][0]
        raise CommandError(f"two pictures of {folder} would both be written to {name}.json: rename one")
    return [Task(image, output / f"{name}.json") for image, name in zip(images, names, strict=True)]


def results_of(
    client: SegmentClient, tasks: list[Task], parameters: EverythingParameters, jobs: int
) -> Iterator[tuple[Task, Exception | None]]:
    """Annotate, `jobs` at once; yield each task when it is done, with the error that it met."""
    with ThreadPoolExecutor(jobs) as threads:
        waiting, running = iter(tasks), dict[Future[None], Task]()
        try:
            while True:
                while len(running) < jobs and (task := next(waiting, None)) is not None:
                    running[threads.submit(annotate, client, task, parameters)] = task
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), error_of(future)
        except BaseException:
            client.close()  # interrupted: what is under way ends at once
            raise


def annotate(client: SegmentClient, task: Task, parameters: EverythingParameters) -> None:
    """Write the records of one picture."""
    image = client.image(task.image)
    write_json(task.output, annotations_of(image.picture, task.image.name, list(image.everything(**parameters))))


def error_of(future: "Future[None]") -> Exception | None:
    """Return the error of one picture, if that is what it is; raise any other."""
    try:
        future.result()
    except (SegmentError, OSError) as error:
        return error
    return None
