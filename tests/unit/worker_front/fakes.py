"""Engines that tests play by hand, and short ways to make sequences."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from services.worker.front.admission import Admission
from services.worker.front.engine import Engine, EngineBounds
from services.worker.front.sequence import Sequence
from services.worker.protocol import Cancel, Command, Event, Load, Output, Ready, Sampling, Step, Submit
from tokenloom.kit.clock import FakeClock

READY = Ready(
    context_length=1000,
    vocab_size=512,
    sequences_max=2,
    total_blocks=40,
    block_tokens=16,
    memory_bytes=123,
    device="fake",
    dtype="none",
    step_tokens_max=512,
)
BOUNDS = EngineBounds(restart_backoff_max_s=0.02, load_attempts_max=2, load_timeout_s=60, silence_max_s=10)
_numbers = itertools.count(1)


def make_sequence(
    prompt: int = 4,
    *,
    output: int = 0,
    leased: bool = True,
    priority: int = 2,
    arrival_ms: int = 0,
    tenant: str = "default",
    request_id: str = "",
) -> Sequence:
    key = str(next(_numbers))
    submit = Submit(
        id=key,
        prompt=[1] * prompt,
        output=[2] * output,
        max_new_tokens=100,
        min_new_tokens=0,
        stop_token_ids=[],
        sampling=Sampling(seed=1),
        priority=priority,
    )
    return Sequence(
        submit,
        request_id=request_id or f"request-{key}",
        tenant=tenant,
        leased=leased,
        arrival_ms=arrival_ms,
        received_ns=1,
    )


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until something is so."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def load(running: int = 0, waiting: int = 0, free_blocks: int = READY.total_blocks) -> Load:
    return Load(running, waiting, READY.sequences_max - running, free_blocks, 0, 0.0, 0.0)


def step(*outputs: Output, running: int = 0, waiting: int = 0, free_blocks: int = 40) -> Step:
    return Step(list(outputs), load(running, waiting, free_blocks))


class FakeLink:
    """An engine process that does what the test says."""

    def __init__(self, on_event: Callable[[Event], None], number: int) -> None:
        self.say = on_event
        self.pid = number
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.commands: list[Command] = []
        self.takes_commands = True
        self.killed = False

    def send(self, command: Command) -> bool:
        if self.takes_commands:
            self.commands.append(command)
        return self.takes_commands

    def kill(self) -> None:
        self.killed = True
        self.die("killed")

    def die(self, how: str = "exit status 1") -> None:
        if not self.ended.done():
            self.ended.set_result(how)

    @property
    def submitted(self) -> list[str]:
        return [command.id for command in self.commands if isinstance(command, Submit)]

    @property
    def cancelled(self) -> list[str]:
        return [command.id for command in self.commands if isinstance(command, Cancel)]


class FakeLaunch:
    """Hands out links, and lets the test wait for the next one."""

    def __init__(self) -> None:
        self._links: asyncio.Queue[FakeLink] = asyncio.Queue()
        self.count = 0
        self.refuses: OSError | None = None

    async def __call__(self, folder: str, on_event: Callable[[Event], None]) -> FakeLink:
        self.count += 1
        if self.refuses is not None:
            raise self.refuses
        link = FakeLink(on_event, self.count)
        self._links.put_nowait(link)
        return link

    async def next(self) -> FakeLink:
        """The next process that was started, once its engine listens to it."""
        link = await asyncio.wait_for(self._links.get(), 5)
        await asyncio.sleep(0)
        return link


def make_engine(
    launch: FakeLaunch, *, queue_max: int = 4, clock: FakeClock | None = None, bounds: EngineBounds = BOUNDS
) -> Engine:
    return Engine(
        model="m",
        worker="1.2.3.4:9100",
        launch=launch,
        admission=Admission(queue_max),
        clock=clock or FakeClock(),
        bounds=bounds,
        changed=lambda: None,
    )
