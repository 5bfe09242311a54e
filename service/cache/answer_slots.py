"""Slots of the arena that one worker holds for the decoder's answers, so that masks too travel through no message.

A real SAM's low-res masks are 512 KiB a prompt. A slot is held by a claim, renewed as long as the worker lives, so that
the index's one rule keeps it safe: nobody else gets it before the last moment at which Triton could still write there.
"""

from dataclasses import dataclass, field
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from service.cache.arena import Arena, Region
from service.cache.index import Claim, Index
from service.cache.record import HEADER_BYTES

MAX_SLOTS = 8
ARENA_SHARE = 32  # at most one slot in so many


@dataclass(slots=True)
class AnswerSlot:
    """Memory for one answer: `offset` from the start of `region`; until `rest_until_s` something may yet be written."""

    claim: Claim
    region: Region
    offset: int
    rest_until_s: float = field(default=0.0)


class AnswerSlots:
    """The slots of one worker. For one event loop."""

    def __init__(self, arena: Arena, index: Index, claim_s: float) -> None:
        self._arena = arena
        self._index = index
        self._claim_s = claim_s
        self._free: list[AnswerSlot] = []
        self._held: dict[int, AnswerSlot] = {}
        for number in range(min(MAX_SLOTS, arena.slots // ARENA_SHARE)):
            claim = index.claim(f"answers {index.owner} {number}".encode().ljust(32, b"\0"), "", "")
            if claim is not None:
                arena.clear_header(claim.slot)
                slot = AnswerSlot(claim, arena.region, arena.block_offset(claim.slot))
                self._held[claim.slot] = slot
                self._free.append(slot)

    def renew(self) -> None:
        """Hold on to the slots; to be called many times within a claim's length."""
        for claim in self._index.renew([slot.claim for slot in self._held.values()]):
            self._held[claim.slot].claim = claim

    def take(self, nbytes: int) -> AnswerSlot | None:
        """Return a slot for `nbytes`; None when they do not fit, or none is free: then the message must carry them."""
        if nbytes > self._arena.slot_bytes - HEADER_BYTES:
            return None
        now_s = monotonic()
        for position, slot in enumerate(self._free):
            if slot.rest_until_s <= now_s and slot.claim.until_s - now_s > self._claim_s / 2:
                return self._free.pop(position)
        return None

    def read(self, slot: AnswerSlot, nbytes: int) -> NDArray[np.uint8]:
        """Return a copy of what was written."""
        return self._arena.block(slot.claim.slot, nbytes).copy()

    def give_back(self, slot: AnswerSlot, *, late: bool) -> None:
        """Return a slot; when the answer did not come (`late`), it rests until it cannot come any more."""
        slot.rest_until_s = monotonic() + self._claim_s if late else 0.0
        self._free.append(slot)

    def release(self) -> None:
        """Give all slots up; they rest, since answers may still be under way."""
        for slot in self._held.values():
            self._index.abandon(slot.claim, written=True)
