"""Walks a stage of the Dockerfile without a container engine: its steps run in a bubblewrap sandbox.

The machine's own Python stands for the base image. What a stage's steps may write is its own tree; the rest of the
machine is read-only to them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.running import ROOT

HIDDEN = {"dev", "proc", "sys", "tmp", "run", "home", "mnt", "media", "srv"}
PYTHON = Path(sys.base_prefix)


@dataclass
class Stage:
    """What a stage of the Dockerfile says: its base, and its instructions in order."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str:
        return [argument for name, argument in self.steps if name == instruction][-1]

    def environment(self) -> dict[str, str]:
        words = [word for name, argument in self.steps if name == "ENV" for word in argument.split()]
        return dict(word.split("=", 1) for word in words)


def read_stages(text: str) -> dict[str, Stage]:
    """Return the stages of a Dockerfile by name."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    stage = Stage("")
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        instruction, _, argument = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = argument.partition(" AS ")
            stages[name] = stage = Stage(base)
        else:
            stage.steps.append((instruction, " ".join(argument.split())))
    return stages


def build(stage: Stage, tree: Path) -> None:
    """Run the RUN and COPY steps of a stage on the folder `tree`, which stands for its file system."""
    folder, environment = Path("/"), stage.environment()
    for instruction, argument in stage.steps:
        if instruction == "WORKDIR":
            folder = Path(argument)
            inside(tree, folder).mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            *sources, target = argument.split()
            for source in sources:
                copy(ROOT / source, inside(tree, folder / target), into=target.endswith("/") or target == ".")
        elif instruction == "RUN":
            pip = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "HOME"))}
            command = ["/bin/sh", "-c", argument]
            subprocess.run(
                [*sandbox(tree, writable=True), "--chdir", str(folder), *variables(environment | pip), *command],
                check=True,
            )


def copy(source: Path, target: Path, *, into: bool) -> None:
    """COPY as Docker does it: a folder's content goes into the target folder."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    if source.is_dir():
        shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    else:
        target = target / source.name if into else target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def run_command(stage: Stage, tree: Path, settings: dict[str, str]) -> list[str]:
    """Return the command line that runs a stage's entrypoint on `tree`: unprivileged, with a read-only root."""
    user, _, group = stage.last("USER").partition(":")
    environment = stage.environment()
    environment["PATH"] = environment["PATH"].replace("$PATH", search_path())
    privileges = [
        "--unshare-user",
        "--uid",
        user,
        "--gid",
        group,
        "--cap-drop",
        "ALL",
        "--unshare-pid",
        "--as-pid-1",
        "--new-session",
    ]
    return [
        *sandbox(tree, writable=False),
        *privileges,
        *("--bind", "/dev/shm", "/dev/shm"),  # noqa: S108 - a pod's two containers share it
        *("--chdir", stage.last("WORKDIR")),
        *variables(environment | settings),
        *json.loads(stage.last("ENTRYPOINT")),
    ]


def sandbox(tree: Path, *, writable: bool) -> list[str]:
    """Return bubblewrap's part of a command line: this machine read-only, `tree` laid over it, a /tmp of its own."""
    bind = "--bind" if writable else "--ro-bind"
    command = ["bwrap", "--die-with-parent", "--clearenv", "--tmpfs", "/"]
    ours = {path.name for path in tree.iterdir()}
    for path in sorted(Path("/").iterdir()):
        if path.is_symlink():
            command += ["--symlink", str(path.readlink()), str(path)]
        elif path.name not in HIDDEN | ours:
            command += ["--ro-bind", str(path), str(path)]
        elif path.name in ours:  # both have it: the machine's part beside the stage's
            beside = [child for child in path.iterdir() if not inside(tree, child).exists()]
            command += [word for child in beside for word in ("--ro-bind", str(child), str(child))]
    for path in sorted(tree.iterdir()):
        for child in sorted(path.iterdir()) if Path("/", path.name).exists() else [path]:
            command += [bind, str(child), "/" + str(child.relative_to(tree))]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108 - the sandbox's own
    return command if writable else [*command, "--remount-ro", "/"]


def variables(environment: dict[str, str]) -> list[str]:
    """Return bubblewrap's arguments for environment variables."""
    named = {"PATH": search_path()} | environment
    return [word for name, value in named.items() for word in ("--setenv", name, value)]


def search_path() -> str:
    """Return the PATH of what stands for the base image."""
    return f"{PYTHON}/bin:/usr/bin:/bin"


def inside(tree: Path, path: Path) -> Path:
    """Return where an absolute path lies in `tree`."""
    return tree / path.relative_to("/")
