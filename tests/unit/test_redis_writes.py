"""The newest write of a key is the one that counts, and what waits is bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cache import write_queue
from service.cache.write_queue import Write, WriteQueue

KEYS = st.sampled_from([b"a", b"b", b"c"])
WRITES = st.tuples(KEYS, st.none() | st.binary(min_size=1, max_size=40))


@given(st.lists(WRITES | st.just("begin") | st.just("end"), max_size=30))
def test_any_order_of_writes_leaves_what_the_last_one_of_each_key_said(steps: list[object]) -> None:
    """Against a dictionary: a write that does not fit counts as a deletion."""
    queue, stored, expected, under_way = WriteQueue(100), {}, {}, None
    for step in steps:
        if isinstance(step, tuple):
            key, record = step
            expected[key] = record if queue.add(Write(key, record)) else None
            assert queue.newest(key) == expected[key]
        elif under_way is not None:
            stored[under_way.key] = under_way.record
            queue.finish()
            under_way = None
        elif step == "begin" and queue:
            under_way = queue.take()
            assert under_way.key in queue
        assert queue.nbytes <= 100
    if under_way is not None:
        stored[under_way.key] = under_way.record
        queue.finish()
    while queue:
        write = queue.take()
        stored[write.key] = write.record
        queue.finish()
    assert stored == expected
    assert queue.nbytes == 0


def test_a_record_without_room_becomes_a_deletion_of_what_is_stored() -> None:
    queue = WriteQueue(10)
    assert queue.add(Write(b"a", b"12345678"))
    assert not queue.add(Write(b"b", b"123"))
    assert [queue.take(), queue.take()] == [Write(b"a", b"12345678"), Write(b"b", None)]


def test_deletions_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_queue, "MAX_KEYS", 2)
    queue = WriteQueue(10)
    assert [queue.add(Write(key, None)) for key in (b"a", b"b", b"c", b"a")] == [True, True, False, True]
