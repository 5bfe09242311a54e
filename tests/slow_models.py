"""The bundled models, slowed down by a sleep in each batch: a known capacity that costs no CPU."""

import shutil
from pathlib import Path

from service.tensors import DECODER_MODEL, ENCODER_MODEL, REFINER_MODEL
from tests.running import ROOT

EXECUTE = "        answers: list[Any] = [None] * len(requests)\n"


def slowed_repository(folder: Path, *, decode_s: float, encode_s: float = 0.0, max_batch: int = 4) -> Path:
    """Copy model_repository/cpu into `folder`, with models that sleep so long per batch; return its path.

    Decoders take batches of `max_batch`: their capacity is `max_batch / decode_s` requests per second, less what the
    small graph itself takes.
    """
    repository = folder / "slowed"
    shutil.copytree(ROOT / "model_repository" / "cpu", repository)
    for model, seconds in ((ENCODER_MODEL, encode_s), (DECODER_MODEL, decode_s), (REFINER_MODEL, decode_s)):
        code = repository / model / "1" / "model.py"
        text = code.read_text()
        assert text.count(EXECUTE) == 1
        code.write_text(text.replace(EXECUTE, f"{EXECUTE}        import time\n\n        time.sleep({seconds})\n"))
    for model in (DECODER_MODEL, REFINER_MODEL):
        config = repository / model / "config.pbtxt"
        assert "max_batch_size: 8\n" in config.read_text()
        config.write_text(config.read_text().replace("max_batch_size: 8\n", f"max_batch_size: {max_batch}\n"))
    return repository
