"""Replies are read whole, however they arrive, and what is no reply ends the connection."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cache.resp import MAX_LINE_BYTES, GarbledError, Reply, ReplyError, ReplyReader, parts_of_command


class Wire:
    """An asyncio transport that only notes that it was given up."""

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def feed(reader: ReplyReader, data: bytes, sizes: list[int]) -> None:
    """Hand over `data` as a socket would: at most as much as there is room for, in pieces of `sizes`."""
    view, turn = memoryview(data), 0
    while view:
        room = reader.get_buffer(-1)
        assert len(room) > 0, "asyncio would take this for the end"
        count = min(len(room), len(view), sizes[turn % len(sizes)])
        room[:count] = view[:count]
        reader.buffer_updated(count)
        view, turn = view[count:], turn + 1


def read(data: bytes, sizes: list[int]) -> tuple[Reply | Exception, bool]:
    """Return the reply, or what was raised instead of it, and whether the connection was given up."""

    async def scenario() -> tuple[Reply | Exception, bool]:
        wire = Wire()
        reader = ReplyReader(wire)  # type: ignore[arg-type]
        waiting = reader.expect()
        feed(reader, data, sizes)
        if not waiting.done():
            waiting.cancel()
            return TimeoutError(), wire.aborted
        reply = waiting.exception() or waiting.result()
        return (bytes(reply) if isinstance(reply, memoryview) else reply), wire.aborted  # type: ignore[return-value]

    return asyncio.run(scenario())


SIZES = st.lists(st.integers(1, 9000), min_size=1, max_size=5)


@given(st.binary(max_size=20_000), SIZES)
def test_a_value_is_read_whole_in_pieces_of_any_size(value: bytes, sizes: list[int]) -> None:
    assert read(b"$%d\r\n%s\r\n" % (len(value), value), sizes) == (value, False)


@given(SIZES)
def test_lines_are_read_whole_in_pieces_of_any_size(sizes: list[int]) -> None:
    assert read(b"+OK\r\n", sizes) == (b"+OK", False)
    assert read(b":42\r\n", sizes) == (b":42", False)
    assert read(b"$-1\r\n", sizes) == (None, False)


def test_an_error_is_a_reply_and_keeps_the_connection() -> None:
    error, aborted = read(b"-OOM command not allowed\r\n", [5])
    assert isinstance(error, ReplyError)
    assert (error.kind, aborted) == ("OOM", False)


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\r\n",
        b"\0" * 100,
        b"*1\r\n$1\r\na\r\n",
        b"$-7\r\n",
        b"$99999999999999\r\n",
        b"$x\r\n",
        b"$\xb2\r\n",
        b"$3\r\nabcdef",
        b"+OK\r\n+OK\r\n",
        b"$1\r\na\r\n$1\r\nb\r\n",
        b"+" * (MAX_LINE_BYTES + 1),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_what_is_no_single_reply_ends_the_connection(garbage: bytes, size: int) -> None:
    reply, aborted = read(garbage, [size])
    assert aborted
    if size > 100:
        assert isinstance(reply, GarbledError)


@given(st.binary(max_size=300), SIZES)
def test_any_bytes_are_a_reply_or_garbled_or_not_complete(data: bytes, sizes: list[int]) -> None:
    reply, _ = read(data, sizes)
    assert reply is None or isinstance(reply, bytes | GarbledError | ReplyError | TimeoutError)


def test_a_reply_whose_caller_has_left_is_given_to_nobody() -> None:
    async def scenario() -> None:
        wire = Wire()
        reader = ReplyReader(wire)  # type: ignore[arg-type]
        reader.expect().cancel()
        feed(reader, b"+OK\r\n", [100])
        feed(reader, b"+OK\r\n", [100])
        assert wire.aborted

    asyncio.run(scenario())


@given(st.lists(st.binary(max_size=10_000), min_size=1, max_size=5))
def test_a_command_is_an_array_of_its_arguments(arguments: list[bytes]) -> None:
    expected = b"*%d\r\n" % len(arguments) + b"".join(b"$%d\r\n%s\r\n" % (len(each), each) for each in arguments)
    assert b"".join(parts_of_command(*arguments)) == expected
