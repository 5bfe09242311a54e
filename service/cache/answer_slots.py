"""Slots of the arena that one worker holds for the decoder's answers, so that masks too travel through no message.

A real SAM's low-res masks are 512 KiB a prompt. A slot is held by a claim, renewed as long as the worker lives. One is
lent only while its claim lasts longer than the latest moment at which Triton could still write the answer, so nobody
else ever gets a slot that an answer is under way to.
"""

from dataclasses import dataclass, field
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from service.cache.arena import Arena, Region
from service.cache.database import IndexUnavailableError
from service.cache.index import Claim, Index
from service.cache.record import HEADER_BYTES

MAX_SLOTS = 8  # of one worker, besides those that rest
ARENA_SHARE = 32  # of all workers together: at most one slot in so many


@dataclass(slots=True)
class AnswerSlot:
    """Memory for one answer: `offset` from the start of `region`; until `rest_until_s` something may yet be written."""

    claim: Claim
    region: Region
    offset: int
    rest_until_s: float = field(default=0.0)


class AnswerSlots:
    """The slots of one of `workers` workers. For one event loop.

    `claim_s` is how long after a call's start its answer could still be written; of one that was given up, the index's
    limits say how long.
    """

    def __init__(self, arena: Arena, index: Index, claim_s: float, workers: int = 1) -> None:
        self._arena = arena
        self._index = index
        self._claim_s = claim_s
        self._late_write_s = min(claim_s, index.limits.late_write_s)
        self._share = arena.slots // (ARENA_SHARE * workers)
        self._free: list[AnswerSlot] = []
        self._held: dict[int, AnswerSlot] = {}
        self.renew()

    def renew(self, *, model_is_silent: bool = False) -> None:
        """Hold on to the slots, and to more if some are missing; to be called many times within `claim_s`.

        While the index cannot be written nothing is lost but time: slots whose claims run low are not lent. While the
        model is silent nothing that rests comes to an end: see `GivenUp.renew`.
        """
        now_s = monotonic()
        for slot in self._free:
            if model_is_silent and slot.rest_until_s > now_s:
                slot.rest_until_s = now_s + self._late_write_s
        try:
            self._take_free_slots()
            claims = self._index.renew([slot.claim for slot in self._held.values()], monotonic() + 2 * self._claim_s)
        except IndexUnavailableError:
            return
        renewed = {claim.slot: claim for claim in claims}
        for number, slot in list(self._held.items()):
            if number in renewed:
                slot.claim = renewed[number]
            else:  # it ran out while nobody renewed, and is another's by now
                del self._held[number]
        self._free = [slot for slot in self._free if slot.claim.slot in self._held]

    def _take_free_slots(self) -> None:
        """Claim what is missing, of free slots: no embedding has to go for an answer. Those that rest are no use."""
        resting = sum(slot.rest_until_s > monotonic() for slot in self._free)
        for number in range(min(MAX_SLOTS + resting, self._share) - len(self._held)):
            name = f"answers {self._index.owner} {monotonic()} {number}"
            claim = self._index.claim(name.encode(), "", "", evict=False)
            if claim is None:
                return
            self._arena.clear_header(claim.slot)
            self._held[claim.slot] = AnswerSlot(claim, self._arena.region, self._arena.block_offset(claim.slot))
            self._free.append(self._held[claim.slot])

    def take(self, nbytes: int) -> AnswerSlot | None:
        """Return a slot for `nbytes`; None when they do not fit, or none is free: then the message must carry them."""
        if nbytes > self._arena.slot_bytes - HEADER_BYTES:
            return None
        now_s = monotonic()
        for position, slot in enumerate(self._free):
            if slot.rest_until_s <= now_s and slot.claim.until_s - now_s >= self._claim_s:
                return self._free.pop(position)
        return None

    def read(self, slot: AnswerSlot, nbytes: int) -> NDArray[np.uint8]:
        """Return a copy of what was written."""
        return self._arena.block(slot.claim.slot, nbytes).copy()

    def give_back(self, slot: AnswerSlot, *, late: bool) -> None:
        """Return a slot; when the answer did not come (`late`), it rests until it cannot come any more."""
        slot.rest_until_s = monotonic() + self._late_write_s if late else 0.0
        if self._held.get(slot.claim.slot) is slot:
            self._free.append(slot)

    def release(self) -> None:
        """Give all slots up; they rest, since answers may still be under way."""
        for slot in self._held.values():
            try:
                self._index.abandon(slot.claim, slot.claim.until_s)
            except IndexUnavailableError:
                return  # their claims run out by themselves
        self._held.clear()
        self._free.clear()
