"""Built and verified models kept in a folder, so that the next start on the same GPU builds nothing.

The folder may be a volume that several pods mount: one builds, the others wait for it. Standard library only.
"""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from export.manifest import ManifestError, read_manifest, sha256_of

_SOURCES = Path(__file__).parent
_KEY_LENGTH = 32


def store_key(*parts: str) -> str:
    """Return the name under which a model is kept that was built from all of `parts`.

    The exporter's own source is one more part: the same checkpoint through another exporter is another graph.
    """
    digest = hashlib.sha256(sha256_of(*sorted(_SOURCES.rglob("*.py"))).encode())
    for part in parts:
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()[:_KEY_LENGTH]


@contextmanager
def kept(folder: Path, key: str, graphs: Sequence[str], build: Callable[[Path], bool]) -> Iterator[Path | None]:
    """Yield `folder`/`key` with one sub-folder a graph; `build` fills it first if it is missing or damaged.

    `build` gets an empty folder and says whether what it built is good; if not, nothing is kept and None is yielded. A
    build that is cut off leaves nothing under the key. Processes that want the same key wait for each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / key
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_whole(place, graphs):
            shutil.rmtree(place, ignore_errors=True)
            _sweep(folder, key)
            partial = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".partial", dir=folder))
            try:
                good = build(partial)
                if good:
                    partial.rename(place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            if not good:
                yield None
                return
        yield place


def is_whole(place: Path, graphs: Sequence[str]) -> bool:
    """Whether every graph is in `place`, verified, and still the bytes its manifest names."""
    try:
        for graph in graphs:
            manifest = read_manifest(place / graph)
            files = [place / graph / "model.plan"] if manifest.engine else sorted((place / graph).glob("model.onnx*"))
            if not manifest.verification or sha256_of(*files) != (manifest.engine or manifest.onnx):
                return False
    except (ManifestError, OSError):
        return False
    return True


def _sweep(folder: Path, key: str) -> None:
    """Remove what builds left that were cut off; we hold the lock, so nobody works on it."""
    for partial in folder.glob(f"{key}.*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
