"""The sim engine on the front's loop: the same events as from a process, and the same tokens."""

import asyncio

from services.worker.protocol import Cancel, Ready, Sampling, Shutdown, Step, Submit
from services.worker.sim.config import SimConfig
from services.worker.sim.inline import InlineLaunch
from services.worker.sim.law import token_at

PATIENCE_S = 10.0


class Front:
    """Hears the events of one engine."""

    def __init__(self):
        self.events = []
        self._came = asyncio.Condition()
        self._tasks = set()

    def hear(self, event):
        self.events.append(event)
        task = asyncio.create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self):
        async with self._came:
            self._came.notify_all()

    async def until(self, holds):
        async with asyncio.timeout(PATIENCE_S), self._came:
            await self._came.wait_for(lambda: holds(self))

    def outputs(self, key):
        steps = [event for event in self.events if isinstance(event, Step)]
        return [output for step in steps for output in step.outputs if output.id == key]

    def tokens(self, key):
        return [token for output in self.outputs(key) for token in output.tokens]

    def ended(self, key):
        return any(output.finish for output in self.outputs(key))


def submit(key, new=4, seed=7):
    return Submit(key, [1, 2, 3], [], new, 0, [], Sampling(seed=seed))


async def launched(**config):
    front = Front()
    config = SimConfig(**({"step_ms": 1.0} | config))
    return front, await InlineLaunch(config)("", front.hear), config


async def test_it_is_ready_only_after_it_was_launched():
    front, _, _ = await launched()
    assert front.events == []
    await front.until(lambda front: len(front.events) == 2)
    ready, idle = front.events
    assert isinstance(ready, Ready)
    assert (idle.outputs, idle.load.free_sequences) == ([], ready.sequences_max)


async def test_sequences_that_came_together_give_the_tokens_of_the_law():
    front, link, config = await launched()
    assert link.send(submit("a"))
    assert link.send(submit("b", new=2, seed=8))
    await front.until(lambda front: front.ended("a") and front.ended("b"))
    assert front.tokens("a") == [token_at(7, 3 + n, config.vocab_size) for n in range(4)]
    assert front.tokens("b") == [token_at(8, 3 + n, config.vocab_size) for n in range(2)]
    assert front.outputs("a")[-1].finish == "length"


async def test_a_cancelled_sequence_says_nothing_more_and_the_next_one_runs():
    front, link, _ = await launched(step_ms=0.5)
    link.send(submit("a", new=8_000))
    await front.until(lambda front: front.tokens("a"))
    link.send(Cancel("a"))
    link.send(submit("b"))
    await front.until(lambda front: front.ended("b"))
    assert not front.ended("a")
    before = len(front.tokens("a"))
    link.send(submit("c"))
    await front.until(lambda front: front.ended("c"))
    assert len(front.tokens("a")) == before


async def test_a_sequence_that_can_never_run_ends_with_an_error():
    front, link, _ = await launched(total_blocks=1, block_tokens=1)
    link.send(submit("a"))
    await front.until(lambda front: front.ended("a"))
    assert front.outputs("a")[0].finish == "error"


async def test_after_its_end_it_takes_nothing_and_says_nothing():
    front, link, _ = await launched(step_ms=0.5)
    link.send(submit("a", new=8_000))
    await front.until(lambda front: front.tokens("a"))
    assert link.send(Shutdown())
    assert link.ended.done()
    heard = len(front.events)
    assert not link.send(submit("b"))
    link.kill()
    other, beside, _ = await launched(step_ms=1.0)
    beside.send(submit("long enough", new=5))
    await other.until(lambda other: other.ended("long enough"))
    assert len(front.events) == heard
