"""Slots that a worker holds for answers: lent once, rested after a late answer, safe from everybody else."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.cache.answer_slots import ARENA_SHARE, MAX_SLOTS, AnswerSlots
from service.cache.arena import Arena, open_arena
from service.cache.index import Index, Limits
from tests.arenas import arena_name
from tests.fakes import no_header

TENSORS = {"embedding": ("float16", (8, 4, 4))}
SLOT_BYTES = 8192
CLAIM_S = 0.4


@pytest.fixture
def shared() -> Iterator[tuple[Arena, Path]]:
    with arena_name() as name:
        arena, files = open_arena(name, "model", TENSORS, SLOT_BYTES * ARENA_SHARE * 4)
        yield arena, files.index


def opened(path: Path, claim_s: float = CLAIM_S) -> Index:
    return Index(path, Limits(claim_s=claim_s, lease_s=0))


def test_what_is_taken_is_taken_and_read_back_as_a_copy(shared: tuple[Arena, Path]) -> None:
    arena, path = shared
    index = opened(path)
    answers = AnswerSlots(arena, index, CLAIM_S)
    first, second = answers.take(100), answers.take(100)
    assert first is not None
    assert second is not None
    assert first.offset != second.offset
    arena.block(first.claim.slot, 100)[:] = 7
    copy = answers.read(first, 100)
    arena.block(first.claim.slot, 100)[:] = 8
    assert (copy == 7).all()
    index.close()


def test_a_small_arena_lends_few_and_nothing_lends_what_does_not_fit(shared: tuple[Arena, Path]) -> None:
    arena, path = shared
    index = opened(path)
    answers = AnswerSlots(arena, index, CLAIM_S)
    lent = [answers.take(1) for _ in range(MAX_SLOTS)]
    assert 0 < sum(slot is not None for slot in lent) <= arena.slots // ARENA_SHARE
    answers.give_back(next(slot for slot in lent if slot), late=False)
    assert answers.take(SLOT_BYTES) is None
    assert answers.take(1) is not None
    index.close()


def test_after_a_late_answer_a_slot_rests(shared: tuple[Arena, Path]) -> None:
    arena, path = shared
    index = opened(path)
    answers = AnswerSlots(arena, index, CLAIM_S)
    while (slot := answers.take(1)) is not None:
        answers.give_back(slot, late=True)
    time.sleep(CLAIM_S / 2)
    answers.renew()
    assert answers.take(1) is None
    time.sleep(CLAIM_S / 2)
    answers.renew()
    assert answers.take(1) is not None
    index.close()


def test_nobody_else_gets_a_slot_that_is_renewed_and_none_is_lent_that_is_not(shared: tuple[Arena, Path]) -> None:
    arena, path = shared
    index, other = opened(path), opened(path)
    answers = AnswerSlots(arena, index, CLAIM_S)
    held = {slot.claim.slot for slot in answers._held.values()}
    taken = set()
    for turn in range(arena.slots * 2):
        if turn % 20 == 0:
            answers.renew()
        claim = other.claim(str(turn).encode().ljust(32), "d", "t")
        if claim is not None:
            taken.add(claim.slot)
            other.abandon(claim)
    assert not taken & held
    time.sleep(CLAIM_S * 1.1)
    assert answers.take(1) is None
    index.close()
    other.close()


def test_released_slots_rest_before_others_get_them(shared: tuple[Arena, Path]) -> None:
    arena, path = shared
    index = opened(path)
    answers = AnswerSlots(arena, index, CLAIM_S)
    held = {slot.claim.slot for slot in answers._held.values()}
    answers.release()
    claims = [index.claim(str(turn).encode().ljust(32), "d", "t") for turn in range(arena.slots)]
    assert not {claim.slot for claim in claims if claim} & held
    time.sleep(CLAIM_S * 2.2)
    late = [index.claim(str(turn).encode().ljust(32), "e", "t") for turn in range(arena.slots)]
    assert {claim.slot for claim in late if claim} >= held
    index.close()


def test_slots_that_ran_out_while_nobody_renewed_do_not_come_back(shared: tuple[Arena, Path]) -> None:
    """Else the decoder would write masks over what others have put there since."""
    arena, path = shared
    index, other = opened(path, claim_s=60), opened(path, claim_s=60)
    answers = AnswerSlots(arena, index, 0.1)
    held = {slot.claim.slot for slot in answers._held.values()}
    time.sleep(0.25)
    claims = [other.claim(str(turn).encode().ljust(32), "d", "t") for turn in range(arena.slots)]
    assert {claim.slot for claim in claims if claim} >= held
    for claim in claims:
        assert claim is None or other.publish(claim, "t", "x", no_header)
    answers.renew()
    assert answers.take(1) is None
    assert other.count() == arena.slots
    index.close()
    other.close()


def test_workers_share_what_there_is_for_answers(shared: tuple[Arena, Path]) -> None:
    arena, path = shared
    index = opened(path)
    assert len(AnswerSlots(arena, index, CLAIM_S, workers=1)._held) == arena.slots // ARENA_SHARE
    assert len(AnswerSlots(arena, index, CLAIM_S, workers=3)._held) == arena.slots // (3 * ARENA_SHARE)
    index.close()


def test_slots_that_rest_are_no_reason_to_lend_none() -> None:
    """Callers that leave, one after the other, must not send everybody's masks through messages."""
    with arena_name() as name:
        arena, files = open_arena(name, "model", TENSORS, SLOT_BYTES * ARENA_SHARE * (2 * MAX_SLOTS + 2))
        index = opened(files.index, claim_s=60)
        answers = AnswerSlots(arena, index, 60)
        while (slot := answers.take(1)) is not None:
            answers.give_back(slot, late=True)
        answers.renew()
        lent = [answers.take(1) for _ in range(MAX_SLOTS)]
        assert None not in lent
        for slot in lent:
            answers.give_back(slot, late=True)
        for _ in range(3):
            answers.renew()
            while (slot := answers.take(1)) is not None:
                answers.give_back(slot, late=True)
        assert len(answers._held) <= arena.slots // ARENA_SHARE
        index.close()


def test_an_answer_that_was_given_up_is_late_for_no_longer_than_the_model_writes(shared: tuple[Arena, Path]) -> None:
    arena, path = shared
    index = Index(path, Limits(claim_s=60, lease_s=0, late_write_s=0.1))
    answers = AnswerSlots(arena, index, 60)
    while (slot := answers.take(1)) is not None:
        answers.give_back(slot, late=True)
    time.sleep(0.15)
    assert answers.take(1) is not None
    index.close()


def test_while_the_model_is_silent_late_answers_stay_late(shared: tuple[Arena, Path]) -> None:
    """One that was stopped writes them when it goes on."""
    arena, path = shared
    index = opened(path)
    answers = AnswerSlots(arena, index, CLAIM_S)
    while (slot := answers.take(1)) is not None:
        answers.give_back(slot, late=True)
    for _ in range(4):
        time.sleep(CLAIM_S / 2)
        answers.renew(model_is_silent=True)
        assert answers.take(1) is None
    time.sleep(CLAIM_S / 2)
    answers.renew()
    time.sleep(CLAIM_S / 2)
    answers.renew()
    assert answers.take(1) is not None
    index.close()
