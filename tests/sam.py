"""Runs the `sam` command line as a person does."""

import os
import subprocess
import sys
from pathlib import Path

from tests.running import ROOT


class Sam:
    """Runs `sam` in a folder of its own."""

    def __init__(self, target: str, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SAM_TARGET": target, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "service.commands", *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def done(self, *arguments: str) -> str:
        """Run a command that succeeds, silently but for its result; return that."""
        ended = self(*arguments)
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout

    def failed(self, code: int, *arguments: str, **environment: str) -> list[str]:
        """Run a command that fails without a result; return the lines that say why."""
        ended = self(*arguments, **environment)
        assert (ended.returncode, ended.stdout) == (code, "")
        assert "Traceback" not in ended.stderr
        return ended.stderr.splitlines()
