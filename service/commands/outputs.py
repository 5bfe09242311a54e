"""What commands write: files that are there in full or not at all, JSON, and pictures."""

import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

STDOUT = Path("-")


def write_whole(path: Path, data: bytes) -> None:
    """Write `path` under a temporary name beside it and rename it, so that nobody ever finds a part of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path`, or print it if that is "-"."""
    text = json.dumps(value)
    if path == STDOUT:
        print(text)
    else:
        write_whole(path, text.encode() + b"\n")


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture in the format that the suffix of `path` names."""
    buffer = io.BytesIO()
    picture.save(buffer, Image.registered_extensions()[path.suffix.lower()])
    write_whole(path, buffer.getvalue())


def say(text: str) -> None:
    """Tell the person at the terminal something that is no result."""
    print(text, file=sys.stderr, flush=True)
