"""`python -m tools.bench_batcher_load PLAN RESULT`: the load of `tools.bench_batcher`, a process of its own.

It calls `WorkerService/Generate` at the mesh Envoy with the metadata that a gateway sends, each request
when it is due whatever became of the others (an open loop), and writes down when its tokens came.
PLAN and RESULT are JSON files of `Plan` and `Result`; times are seconds after `Plan.start_unix_s`.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import sys
import time
from pathlib import Path

import msgspec
import uvloop
from google.rpc import status_pb2
from loom.inference.v1 import inference_pb2
from loom.worker.v1 import worker_pb2

from tokenloom.contract.headers import RequestHeaders
from tokenloom.kit.errors import STATUS_DETAILS_KEY, from_status
from tools.bench_batcher_wire import Connection, WireError, connect, header_block

LOAD_NICE = 5
"""Clients are other machines too: what is measured goes first."""
PSEUDO = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/loom.worker.v1.WorkerService/Generate"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
)
VOCAB = 256
UNTRACED = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
"""As from an edge that decided not to keep the trace."""
END_MAX_S = 30.0
"""After the last deadline, for answers that somebody forgot."""


class Ask(msgspec.Struct, array_like=True, frozen=True):
    """One request of the plan."""

    due_s: float
    tenant: str
    priority: int
    """loom.inference.v1.Priority."""
    prompt_tokens: int
    new_tokens: int


class Plan(msgspec.Struct, frozen=True):
    """What to send."""

    target: str
    version: str
    start_unix_s: float
    timeout_s: float
    channels: int
    steps_aside: bool
    """Take only the CPU that nobody else wants: this process stands for other machines."""
    asks: list[Ask]


class Seen(msgspec.Struct, array_like=True):
    """What became of one request; the plan's order."""

    sent_s: float = 0.0
    ended_s: float = 0.0
    error: str = ""
    """A reason of loom.errors.v1, or a gRPC code; empty when all tokens came."""
    tokens: list[tuple[float, int]] = []
    """When a message came, and how many tokens it held."""

    @property
    def first_s(self) -> float | None:
        """When the first token came."""
        return self.tokens[0][0] if self.tokens else None


class Result(msgspec.Struct, frozen=True):
    """What came of a plan."""

    seen: list[Seen]
    cpu_s: float


def main() -> None:
    """Runs one plan to its end."""
    plan_file, result_file = map(Path, sys.argv[1:3])
    plan = msgspec.json.decode(plan_file.read_bytes(), type=Plan)
    os.sched_setscheduler(0, os.SCHED_IDLE if plan.steps_aside else os.SCHED_OTHER, os.sched_param(0))
    os.nice(LOAD_NICE)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seen = runner.run(_Load(plan).run())
    result_file.write_bytes(msgspec.json.encode(Result(seen, time.process_time())))


class _Load:
    """One plan, being run."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._seen = [Seen(tokens=[]) for _ in plan.asks]
        self._pseudo = [(":authority", plan.target), *PSEUDO]

    async def run(self) -> list[Seen]:
        """Returns when every request has ended."""
        plan = self._plan
        connections = [await connect(plan.target) for _ in range(plan.channels)]
        bodies = [self._body(index) for index in range(len(plan.asks))]
        calls: list[asyncio.Task[None]] = []
        gc.collect()
        gc.freeze()
        for index in sorted(range(len(plan.asks)), key=lambda i: plan.asks[i].due_s):
            ahead_s = plan.asks[index].due_s - self._now_s()
            if ahead_s > 0:
                await asyncio.sleep(ahead_s)
            connection = connections[len(calls) % len(connections)]
            calls.append(asyncio.create_task(self._call(connection, index, bodies[index])))
        async with asyncio.timeout(plan.timeout_s + END_MAX_S):
            await asyncio.gather(*calls)
        for connection in connections:
            connection.close()
        return self._seen

    def _now_s(self) -> float:
        return time.time() - self._plan.start_unix_s

    def _body(self, index: int) -> bytes:
        """Prompts share no beginning: whose cache holds what is not the question here."""
        ask = self._plan.asks[index]
        first = (index % VOCAB, index // VOCAB % VOCAB, index // VOCAB**2 % VOCAB)
        prompt = (first * (-(-ask.prompt_tokens // 3)))[: ask.prompt_tokens]
        request = worker_pb2.GenerateRequest(
            request_id=f"bench-{index}",
            model_version=self._plan.version,
            prompt_token_ids=prompt,
            max_new_tokens=ask.new_tokens,
            priority=inference_pb2.Priority.ValueType(ask.priority),
            tenant=ask.tenant,
            sampling=inference_pb2.SamplingParams(seed=index),
        )
        return request.SerializeToString()

    def _headers(self, index: int) -> bytes:
        ask, now_ms = self._plan.asks[index], time.time_ns() // 1_000_000
        told = RequestHeaders(
            request_id=f"bench-{index}",
            arrival_unix_ms=now_ms,
            deadline_unix_ms=now_ms + int(self._plan.timeout_s * 1000),
            model=self._plan.version,
            tenant=ask.tenant,
            priority=ask.priority,
            prompt_tokens=ask.prompt_tokens,
            max_new_tokens=ask.new_tokens,
        )
        timeout = ("grpc-timeout", f"{int(self._plan.timeout_s * 1000)}m")
        return header_block([*self._pseudo, timeout, *told.encode(), UNTRACED])

    async def _call(self, connection: Connection, index: int, body: bytes) -> None:
        seen = self._seen[index]
        seen.sent_s = self._now_s()

        def note(data: bytes) -> None:
            count = len(worker_pb2.GenerateResponse.FromString(data).tokens.token_ids)
            seen.tokens.append((self._now_s(), count))

        try:
            fields = await connection.start(self._headers(index), body, note).ended
        except WireError as error:
            seen.error = f"WIRE: {error}"
        else:
            seen.error = refusal_of(fields)
        seen.ended_s = self._now_s()
        given = sum(count for _, count in seen.tokens)
        if not seen.error and given != self._plan.asks[index].new_tokens:
            seen.error = "TOKENS_MISSING"


def refusal_of(fields: dict[str, str]) -> str:
    """The reason in an answer's last fields; empty for an answer that ended well."""
    code = int(fields.get("grpc-status", "2"))
    if code == 0:
        return ""
    status = status_pb2.Status(code=code, message=fields.get("grpc-message", ""))
    if details := fields.get(STATUS_DETAILS_KEY):
        status.ParseFromString(base64.b64decode(details + "=" * (-len(details) % 4)))
    return from_status(status).reason


if __name__ == "__main__":
    main()
