"""ViT-B on the CPU: what an image's first prompt costs, and what each further one does: `python -m benchmarks.vit_b`.

The real shapes with random weights (arithmetic costs the same), exported by this project's own export into a model
repository, served by a real Triton behind the real gateway. Masks of random weights are noise, with longer run lengths
than a real one has; the answer's own account of its stages tells them apart. Takes some minutes.
"""

import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from benchmarks.callers import OK, Answer, Target, calling
from benchmarks.figures import Sheet, arguments
from benchmarks.photographs import photograph
from benchmarks.random_weights import random_weights
from benchmarks.services import Service, real_service
from export.build import export_graphs, install
from export.checkpoint import Checkpoint
from export.spec import MODELS

TITLE = "ViT-B on the CPU"
DEADLINE_S = 120.0
STAGES = ("queue", "decode", "masks")


def main() -> None:
    """Export, serve, ask."""
    parser = arguments("vit_b", __doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="sam-vit-b")
    parser.add_argument("--images", type=int, default=3, help="each is encoded once (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=20, help="on each image (default: %(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.images, options.prompts = 2, 5
    sheet = Sheet("vit_b")
    with tempfile.TemporaryDirectory(prefix="sam-vit-b-") as folder:
        exporting = multiprocessing.get_context("spawn").Process(target=export, args=(options.model, Path(folder)))
        exporting.start()  # in a process of its own: what tracing takes of the memory is free again afterwards
        exporting.join()
        assert exporting.exitcode == 0
        with real_service(SAM_MODEL_REPOSITORY=folder, SAM_DEFAULT_DEADLINE_S=str(DEADLINE_S)) as service:
            asyncio.run(measure(sheet, service, options.images, options.prompts))
    sheet.publish(options.csv)


def export(name: str, repository: Path) -> None:
    """Make a model repository with a model of random weights."""
    model = MODELS[name]
    checkpoint = Checkpoint(model, random_weights(model.architecture), f"sha256:{0:064}")
    with tempfile.TemporaryDirectory(prefix="sam-graphs-") as graphs:
        export_graphs(checkpoint, "fp32", Path(graphs), print)
        install(model, "cpu", Path(graphs), repository)
    for path in repository.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        del config.model_warmup[1:]  # 64 prompts at once, which nobody sends here, would take gigabytes and minutes
        path.write_text(text_format.MessageToString(config))


async def measure(sheet: Sheet, service: Service, images: int, prompts: int) -> None:
    """Upload each image, then prompt it."""
    target = Target("HTTP", service.addresses["HTTP"], deadline_s=DEADLINE_S)
    async with calling(target) as caller:
        for number in range(images):
            image_id = f"vit-{number}"
            began_s = time.monotonic()
            good(await caller.upload(image_id, photograph(number)))
            good(await caller.prompt(image_id))
            first_ms = 1000 * (time.monotonic() - began_s)
            following_ms, stages = [], list[dict[str, float]]()
            for _ in range(prompts):
                began_s = time.monotonic()
                stages.append(json.loads(good(await caller.prompt(image_id)).content)["timings_ms"])
                following_ms.append(1000 * (time.monotonic() - began_s))
            following = statistics.median(following_ms)
            sheet.add(TITLE, "first prompt, with the upload", {"ms": first_ms})
            sheet.add(TITLE, "following prompts, median", {"ms": following})
            for stage in STAGES:
                sheet.add(TITLE, f"... {stage}", {"ms": statistics.median(each[stage] for each in stages)})
            sheet.add(TITLE, "first over following", {"x": first_ms / following})


def good(answer: Answer) -> Answer:
    """Return the answer if it is one."""
    assert answer.outcome == OK, answer.outcome
    return answer


if __name__ == "__main__":
    main()
