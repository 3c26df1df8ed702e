"""Contexts that block: entered and left in threads, and never half."""

import asyncio
import threading
from contextlib import aclosing, contextmanager

import pytest

from services.modelstore.adapters.threads import entered


class Watched:
    """A context that says where and how it was left."""

    def __init__(self):
        self.threads = []
        self.left_with = []
        self.entering = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    @contextmanager
    def context(self):
        self.entering.set()
        self.go_on.wait(10)
        self.threads.append(threading.get_ident())
        try:
            yield "value"
        except BaseException as error:
            self.left_with.append(type(error))
            raise
        finally:
            self.threads.append(threading.get_ident())


async def test_both_ends_are_in_threads():
    watched = Watched()
    async with entered(watched.context()) as value:
        assert value == "value"
    assert len(watched.threads) == 2
    assert threading.get_ident() not in watched.threads


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, KeyError])
async def test_the_context_sees_what_its_block_raised(error):
    watched = Watched()
    with pytest.raises(error):
        async with entered(watched.context()):
            raise error
    assert watched.left_with == [error]


async def test_a_context_may_swallow_an_error():
    swallowed = []

    @contextmanager
    def swallowing():
        try:
            yield
        except ValueError as error:
            swallowed.append(error)

    error = ValueError()
    async with entered(swallowing()):
        raise error
    assert swallowed == [error]


async def test_closing_a_generator_leaves_the_context():
    watched = Watched()

    async def numbers():
        async with entered(watched.context()):
            yield 1

    async with aclosing(numbers()) as running:
        await anext(running)
    assert len(watched.threads) == 2


async def test_whoever_is_cancelled_while_entering_leaves_nothing_entered():
    watched = Watched()
    watched.go_on.clear()

    async def work():
        async with entered(watched.context()):
            raise AssertionError("it was cancelled before")

    running = asyncio.create_task(work())
    await asyncio.to_thread(watched.entering.wait, 10)
    running.cancel()
    await asyncio.sleep(0)
    watched.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(watched.threads) == 2


async def test_an_error_while_entering_is_the_callers():
    @contextmanager
    def failing():
        raise OSError("no")
        yield

    with pytest.raises(OSError, match="no"):
        async with entered(failing()):
            raise AssertionError("it was not entered")
