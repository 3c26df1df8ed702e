"""Who gets which report, and when."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from services.worker.front.publisher import Published, Publisher
from tests.unit.worker_front.fakes import until
from tokenloom.kit.clock import SystemClock


class Numbers:
    """A report that is only its number; `everything` has a mark."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._changes = Published(bytes([number]))
        self._everything = Published(bytes([number]) + b"!")

    def changes(self) -> Published:
        return self._changes

    def everything(self) -> Published:
        return self._everything


def counting() -> tuple[list[int], Publisher]:
    built: list[int] = []

    def build_next() -> Numbers:
        built.append(len(built))
        return Numbers(len(built))

    return built, Publisher(build_next, SystemClock(), report_interval_s=0.02, heartbeat_s=0.04)


async def test_new_listener_hears_the_present_state_at_once() -> None:
    built, publisher = counting()
    async with aclosing(publisher.listen()) as reports:
        assert (await anext(reports)).SerializeToString() == b"\x01!"
        assert built == [0]
    await publisher.close()


async def test_all_listeners_get_the_same_built_report() -> None:
    built, publisher = counting()
    async with aclosing(publisher.listen()) as one, aclosing(publisher.listen()) as two:
        await asyncio.gather(anext(one), anext(two))
        before = len(built)
        ours, theirs = await asyncio.gather(anext(one), anext(two))
        assert ours is theirs
        assert len(built) == before + 1
    await publisher.close()


async def test_a_change_is_pushed_long_before_the_heartbeat() -> None:
    built: list[int] = []

    def build_next() -> Numbers:
        built.append(len(built))
        return Numbers(len(built))

    publisher = Publisher(build_next, SystemClock(), report_interval_s=0.001, heartbeat_s=600)
    async with asyncio.timeout(5), aclosing(publisher.listen()) as reports:
        await anext(reports)
        for count in (2, 3):
            publisher.changed()
            publisher.changed()
            assert (await anext(reports)).SerializeToString() == bytes([count])
    await publisher.close()


async def test_a_change_is_not_lost_when_a_new_listener_is_served_first() -> None:
    built, publisher = counting()
    async with asyncio.timeout(5), aclosing(publisher.listen()) as one:
        await anext(one)
        publisher._heartbeat_s = 600
        await until(lambda: publisher._due_in_s() <= 0)
        publisher.changed()
        async with aclosing(publisher.listen()) as two:
            await anext(two)
            count = len(built)
            publisher.changed()
            await until(lambda: len(built) > count)
    await publisher.close()


async def test_reports_go_on_after_one_that_could_not_be_built() -> None:
    seen: list[int] = []
    failures: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: failures.append(what))

    def build_next() -> Numbers:
        seen.append(len(seen))
        if len(seen) == 2:
            raise ZeroDivisionError
        return Numbers(len(seen))

    publisher = Publisher(build_next, SystemClock(), report_interval_s=0.001, heartbeat_s=0.01)
    async with asyncio.timeout(5), aclosing(publisher.listen()) as reports:
        await anext(reports)
        assert (await anext(reports)).SerializeToString() == b"\x03!", "the second was lost"
    assert len(failures) == 1
    await publisher.close()


async def test_nothing_is_built_while_nobody_listens() -> None:
    built, publisher = counting()
    async with aclosing(publisher.listen()) as reports:
        await anext(reports)
    count = len(built)
    publisher.changed()
    await asyncio.sleep(0.06)
    assert (len(built), publisher.listeners) == (count, 0)


async def test_slow_listener_skips_to_the_newest() -> None:
    built, publisher = counting()
    async with aclosing(publisher.listen()) as reports:
        await anext(reports)
        await until(lambda: len(built) >= 4)
        assert (await anext(reports)).SerializeToString() == bytes([len(built)]) + b"!"
    await publisher.close()


async def test_close_ends_every_listener() -> None:
    _, publisher = counting()

    async def listen() -> int:
        return len([report async for report in publisher.listen()])

    listening = asyncio.create_task(listen())
    await until(lambda: publisher.listeners == 1)
    await publisher.close()
    assert await asyncio.wait_for(listening, 5) >= 0
