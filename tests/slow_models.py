"""The bundled models, slowed down by a sleep in each batch: a known capacity that costs no CPU."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from export.repository_from_spec import PROMPT_INSTANCES
from service.tensors import DECODER_MODEL, ENCODER_MODEL, REFINER_MODEL
from tests.running import ROOT

INSTANCES = PROMPT_INSTANCES  # of each decoder: so many batches at once
RUN = "        counts = [len(feed[self.inputs[0]]) for feed in feeds]\n"
SLEEP = """
        import time

        # A canary's image is blank, and those of callers, in tests that count, are not.
        blank = sum(feed["image"].any() == 0 for feed in feeds) if "image" in self.inputs else 0
        with Path(__file__).with_name("ran").open("ab") as ran:
            ran.write(b"." * (len(feeds) - blank))
        sleep_s = Path(__file__).with_name("sleep_s")
        if sleep_s.exists():
            time.sleep(float(sleep_s.read_text()))
"""


@dataclass(frozen=True)
class SlowModels:
    """A model repository whose models can be slowed down while they serve; they start at their own speed."""

    path: Path

    def slow_down(self, *, decode_s: float = 0.0, encode_s: float = 0.0) -> None:
        """Have each batch take so much longer from now on."""
        for model, seconds in ((ENCODER_MODEL, encode_s), (DECODER_MODEL, decode_s), (REFINER_MODEL, decode_s)):
            new = self.path / model / "1" / "sleep_s.new"
            new.write_text(str(seconds))
            new.replace(new.with_name("sleep_s"))

    def ran(self, model: str) -> int:
        """Return for how many requests the model began to compute: Triton counts those that were cancelled, too.

        An encoder's canaries are left out.
        """
        return (self.path / model / "1" / "ran").stat().st_size


def slow_models(folder: Path, *, max_batch: int = 4) -> SlowModels:
    """Copy model_repository/cpu into `folder`; decoders take at most `max_batch` requests a batch.

    Their capacity is then `INSTANCES * max_batch / decode_s` requests per second, less what the small graph takes.
    """
    repository = folder / "slowed"
    shutil.copytree(ROOT / "model_repository" / "cpu", repository)
    for model in (ENCODER_MODEL, DECODER_MODEL, REFINER_MODEL):
        replace(repository / model / "1" / "model.py", RUN, RUN + SLEEP)
    for model in (DECODER_MODEL, REFINER_MODEL):
        replace(repository / model / "config.pbtxt", "max_batch_size: 4\n", f"max_batch_size: {max_batch}\n")
    return SlowModels(repository)


def replace(file: Path, old: str, new: str) -> None:
    """Replace the one `old` in a file."""
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
