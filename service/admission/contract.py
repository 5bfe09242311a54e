"""What admission is told and what it tells: lanes, what the model spent, why a request was refused."""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Lane(Enum):
    """Light and heavy work, which never wait for each other's permits."""

    PROMPT = "prompt"  # on a cached image: the decoder alone
    ENCODE = "encode"  # whatever may need the encoder


class Refusal(Enum):
    """Why a request was refused before any work."""

    WAIT = "wait"  # it would have waited too long
    BYTES = "bytes"  # too many bytes of uploads are being held
    RATE = "rate"  # its tenant asks more often than it may


@dataclass(frozen=True, slots=True)
class Spent:
    """What a model server says of one lane since it began: requests answered, their time in its queue and at work."""

    requests: int
    queue_s: float
    compute_s: float


class Observer(Protocol):
    """Who counts what admission does."""

    def admission(self, lane: Lane, *, held: int, waiting: int, limit: int) -> None:
        """How things are in a lane: requests at work, requests waiting, and how many may be at work."""

    def bodies(self, nbytes: int) -> None:
        """So many bytes of request bodies are being held."""

    def refused(self, why: Refusal) -> None:
        """A request was refused."""


class Unobserved:
    """An `Observer` that does not look."""

    def admission(self, lane: Lane, *, held: int, waiting: int, limit: int) -> None:
        """Ignore it."""

    def bodies(self, nbytes: int) -> None:
        """Ignore it."""

    def refused(self, why: Refusal) -> None:
        """Ignore it."""
