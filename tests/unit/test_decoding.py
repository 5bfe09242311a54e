"""Decode processes: real ones, which are killed, stopped, and given pictures that take long."""

import asyncio
import errno
import os
import signal
import socket
import sys
import threading
from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.call import CURRENT, Call, TraceContext
from service.decode_job import Answer, Job, Verdict
from service.decoding import ABANDONED, CRASHED, INLINE_BYTES, TOO_SLOW, DecodePool
from service.errors import ImageTooLargeError, OverloadedError, UnsupportedImageError
from service.image import ImageLimits
from service.image_header import MAX_SCANS
from tests.bombs import MIB, half_red, jpeg, refused_in_a_process, runaway_jpeg, saved
from tests.running import descendants_of

LIMITS = ImageLimits(1_000_000, 64_000_000)
PICTURE = saved(half_red(), "PNG")
SECONDS_OF_WORK = runaway_jpeg(8000, MAX_SCANS - 6)


class Pool:
    """A running pool and what it told."""

    def __init__(self, size: int, max_decode_s: float, limits: ImageLimits) -> None:
        self.lost: list[str] = []
        self.decoder = DecodePool(size, limits, self.lost.append, max_decode_s)

    async def process(self) -> int:
        """Return the pid of the (first) process, when there is one that is ready."""
        await self.decoder.decode(PICTURE, 64)
        return processes()[0]


def processes() -> list[int]:
    return [
        pid for pid in descendants_of(os.getpid()) if b"decode_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def run(
    scenario: Callable[[Pool], Coroutine[None, None, None]],
    *,
    size: int = 1,
    max_decode_s: float = 30.0,
    limits: ImageLimits = LIMITS,
) -> None:
    async def work() -> None:
        pool = Pool(size, max_decode_s, limits)
        async with pool.decoder.running():
            await asyncio.wait_for(scenario(pool), 60)

    asyncio.run(work())
    assert processes() == []


def test_a_picture_comes_back_as_the_encoder_s_input() -> None:
    async def scenario(pool: Pool) -> None:
        image = await pool.decoder.decode(PICTURE, 60)
        assert image.size == (20, 30)
        assert image.placed.valid_size == (40, 60)
        assert image.placed.pixels.shape == (60, 60, 3)
        np.testing.assert_array_equal(image.placed.pixels[20, 5], (255, 0, 0))
        np.testing.assert_array_equal(image.placed.pixels[20, 55], (0, 0, 255))
        assert not image.placed.pixels[40:].any()

    run(scenario)


def test_a_large_upload_is_read_whole() -> None:
    """Larger than what is copied without a thread, and than a socket's buffer."""
    noise = np.random.default_rng(0).integers(0, 255, (500, 500, 3), np.uint8)

    async def scenario(pool: Pool) -> None:
        image = await pool.decoder.decode(saved(Image.fromarray(noise), "PNG"), 500)
        np.testing.assert_array_equal(image.placed.pixels, noise)

    run(scenario)


def test_a_part_of_a_picture_is_a_picture() -> None:
    async def scenario(pool: Pool) -> None:
        image = await pool.decoder.decode(PICTURE, 60, (10, 5, 30, 15))
        assert image.size == (10, 20)
        assert image.placed.valid_size == (30, 60)
        np.testing.assert_array_equal(image.placed.pixels[10, 5], (255, 0, 0))
        np.testing.assert_array_equal(image.placed.pixels[10, 30], (0, 0, 255))

    run(scenario)


def test_a_tenant_s_picture_does_not_wait_for_all_of_another_s() -> None:
    async def scenario(pool: Pool) -> None:
        done: list[str] = []

        async def decode(tenant: str) -> None:
            CURRENT.set(Call("http", "", TraceContext(), tenant))
            await pool.decoder.decode(PICTURE, 64)
            done.append(tenant)

        greedy = [asyncio.create_task(decode("greedy")) for _ in range(8)]
        await asyncio.sleep(0)
        await asyncio.gather(*greedy, asyncio.create_task(decode("modest")))
        assert done.index("modest") <= 2

    run(scenario)


@pytest.mark.parametrize("name", refused_in_a_process())
def test_a_bomb_costs_an_error(name: str) -> None:
    async def scenario(pool: Pool) -> None:
        before = await pool.process()
        with pytest.raises(UnsupportedImageError, match="100 scans" if "scan" in name else "damaged"):
            await pool.decoder.decode(refused_in_a_process()[name], 64)
        assert await pool.process() == before
        assert pool.lost == []

    run(scenario)


def test_the_size_is_checked_where_it_is_decoded_too() -> None:
    async def scenario(pool: Pool) -> None:
        with pytest.raises(ImageTooLargeError):
            await pool.decoder.decode(jpeg(9000, 9000), 64)

    run(scenario)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_costs_its_picture_and_no_other(number: int) -> None:
    async def scenario(pool: Pool) -> None:
        pid = await pool.process()
        dying = asyncio.create_task(pool.decoder.decode(SECONDS_OF_WORK, 64))
        after = asyncio.create_task(pool.decoder.decode(PICTURE, 64))
        await asyncio.sleep(0.2)
        os.kill(pid, number)
        with pytest.raises(UnsupportedImageError, match="too much"):
            await dying
        assert (await after).size == (20, 30)
        assert pool.lost == [CRASHED]

    run(scenario)


def test_a_process_that_died_idle_costs_no_more() -> None:
    async def scenario(pool: Pool) -> None:
        os.kill(await pool.process(), signal.SIGKILL)
        with pytest.raises(UnsupportedImageError):
            await pool.decoder.decode(PICTURE, 64)
        assert (await pool.decoder.decode(PICTURE, 64)).size == (20, 30)

    run(scenario)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_runaway_is_killed_and_replaced(frozen: bool) -> None:  # noqa: FBT001 - pytest passes it
    async def scenario(pool: Pool) -> None:
        pid = await pool.process()
        if frozen:
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(UnsupportedImageError, match="too much"):
            await pool.decoder.decode(SECONDS_OF_WORK, 64)
        assert await pool.process() != pid
        assert pool.lost == [TOO_SLOW]

    run(scenario, max_decode_s=0.5)


def test_a_caller_that_leaves_frees_the_process() -> None:
    async def scenario(pool: Pool) -> None:
        pid = await pool.process()
        leaving = asyncio.create_task(pool.decoder.decode(SECONDS_OF_WORK, 64))
        await asyncio.sleep(0.1)
        leaving.cancel()
        assert await pool.process() != pid
        assert leaving.cancelled()
        assert pool.lost == [ABANDONED]

    run(scenario)


def test_a_caller_that_leaves_while_waiting_costs_nothing() -> None:
    async def scenario(pool: Pool) -> None:
        pid = await pool.process()
        os.kill(pid, signal.SIGSTOP)
        working = asyncio.create_task(pool.decoder.decode(PICTURE, 64))
        waiting = asyncio.create_task(pool.decoder.decode(SECONDS_OF_WORK, 64))
        await asyncio.sleep(0.05)
        waiting.cancel()
        os.kill(pid, signal.SIGCONT)
        assert (await working).size == (20, 30)
        assert await pool.process() == pid
        assert pool.lost == []

    run(scenario)


@pytest.mark.parametrize("begun", [True, False])
def test_a_caller_that_leaves_while_its_bytes_are_written_writes_into_no_other_file(
    begun: bool,  # noqa: FBT001 - pytest passes it
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread that writes goes on, or has yet to begin; the number of the file that is closed is another's then."""
    pwrite, goes_on = os.pwrite, threading.Event()

    async def scenario(pool: Pool) -> None:
        await pool.process()
        loop, is_there = asyncio.get_running_loop(), asyncio.Event()

        def late(*arguments: Any) -> int:  # noqa: ANN401
            loop.call_soon_threadsafe(is_there.set)
            goes_on.wait()
            return pwrite(*arguments)

        loop.set_default_executor(ThreadPoolExecutor(1))
        if not begun:
            loop.run_in_executor(None, goes_on.wait)
        before = descriptors()
        monkeypatch.setattr(os, "pwrite", late)
        leaving = asyncio.create_task(pool.decoder.decode(b"a" * (INLINE_BYTES + 1), 64))
        await (is_there.wait() if begun else asyncio.sleep(0.05))
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await leaving
        others = [os.memfd_create("another's") for _ in range(8)]
        goes_on.set()
        await loop.run_in_executor(None, int)  # its turn comes when all is written
        assert [os.fstat(each).st_size for each in others] == [0] * 8
        for each in others:
            os.close(each)
        assert descriptors() == before

    run(scenario)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def raised_once(monkeypatch: pytest.MonkeyPatch, where: object, name: str, error: Exception) -> None:
    """Have a function raise the error when it is next called, and then do what it did."""
    function = getattr(where, name)

    def raising(*_: object, **__: object) -> None:
        monkeypatch.setattr(where, name, function)
        raise error

    monkeypatch.setattr(where, name, raising)


@pytest.mark.parametrize(
    ("where", "name", "error", "told", "lost_as"),
    [
        (socket, "send_fds", OSError(errno.ETOOMANYREFS, ""), OverloadedError, CRASHED),
        (socket, "send_fds", OSError(errno.EINVAL, ""), OSError, CRASHED),
        (socket, "send_fds", RuntimeError(), RuntimeError, TOO_SLOW),
        (BaseSelectorEventLoop, "sock_recv", OSError(errno.ENOMEM, ""), OverloadedError, CRASHED),
        (BaseSelectorEventLoop, "sock_recv", RuntimeError(), RuntimeError, CRASHED),
    ],
)
def test_whatever_goes_wrong_with_a_process_there_is_another_one(
    where: object, name: str, error: Exception, told: type[Exception], lost_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(pool: Pool) -> None:
        pid = await pool.process()
        raised_once(monkeypatch, where, name, error)
        with pytest.raises(told):
            await pool.decoder.decode(PICTURE, 64)
        assert await pool.process() != pid
        assert pool.lost == [lost_as]

    run(scenario, max_decode_s=0.5)


async def decode_one(pool: Pool) -> None:
    assert (await pool.decoder.decode(PICTURE, 64)).size == (20, 30)


def test_whatever_goes_wrong_when_one_is_started_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    raised_once(monkeypatch, asyncio, "create_subprocess_exec", RuntimeError("can't start new thread"))
    run(decode_one)


def test_one_that_does_not_become_ready_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nmkdir {tmp_path}/begun && exec sleep 60\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("service.decoding.START_S", 2.0)
    run(decode_one)


def test_answers_are_their_own_after_many_callers_left() -> None:
    """Whoever comes next must never be given the answer to a picture somebody left behind."""
    sizes = [(width, 64 - width) for width in range(1, 64)]
    pictures = [saved(half_red(*size), "PNG") for size in sizes]

    async def scenario(pool: Pool) -> None:
        generator = np.random.default_rng(0)
        tasks = [asyncio.create_task(pool.decoder.decode(each, 64)) for each in pictures]
        for index in generator.permutation(len(tasks))[:40]:
            await asyncio.sleep(0.001)
            tasks[index].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for (width, height), result in zip(sizes, results, strict=True):
            assert isinstance(result, asyncio.CancelledError) or result.size == (height, width)  # type: ignore[union-attr]
        assert any(not isinstance(result, asyncio.CancelledError) for result in results)

    run(scenario, size=2)


def test_a_decode_process_is_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings, no sockets but its own, no new rights, and memory for a picture of the allowed size."""
    monkeypatch.setenv("SAM_CACHE_SECRET", "do not tell")

    def check(process: Path) -> None:
        assert b"SAM_" not in (process / "environ").read_bytes()
        assert sum(str(fd.readlink()).startswith("socket:") for fd in (process / "fd").iterdir()) == 1
        assert "NoNewPrivs:\t1" in (process / "status").read_text()
        (line,) = [each for each in (process / "limits").read_text().splitlines() if each.startswith("Max address")]
        allowed = int(line.split()[3])
        used = int((process / "statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        assert LIMITS.max_pixels * 16 < allowed - used < 2 * LIMITS.max_pixels * 16 + 128 * MIB

    async def scenario(pool: Pool) -> None:
        check(Path(f"/proc/{await pool.process()}"))

    run(scenario)


def test_messages_are_what_they_were() -> None:
    assert Job.unpack(Job(5000, 1024).pack()) == Job(5000, 1024)
    assert Job(5000, 1024).answer_at == 8192
    assert Answer.unpack(Answer(Verdict.DECODED, 2, 3).pack()) == Answer(Verdict.DECODED, 2, 3)
    for wrong in (b"", b"\0", b"\x09" + bytes(8)):
        with pytest.raises(ValueError, match=r"length|Verdict"):
            Answer.unpack(wrong)
