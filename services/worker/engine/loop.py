"""The engine's process: commands from a socket, one `Step` back for each step.

Commands are taken between steps and never waited for while there is work. With a `pipeline_depth` of 2
the next step is prepared and the one before is told while a step computes (pipeline.py). The process ends
when the socket does, so no engine outlives its front, and when the engine cannot start, after saying why.
"""

from __future__ import annotations

import socket
import time
import traceback
from contextlib import closing

import msgspec

from services.worker.engine.config import EngineConfig
from services.worker.engine.engine import Engine
from services.worker.engine.errors import EngineError, load_failed
from services.worker.engine.host import spare_collections
from services.worker.engine.loader import LoadedModel, load
from services.worker.engine.pipeline import depth_of, make_pipeline
from services.worker.engine.progress import STARTED, WEIGHTS_TO
from services.worker.engine.room import fitted
from services.worker.engine.warmup import warm_up
from services.worker.link import GONE, FrontLink
from services.worker.protocol import Failed, Output, Progress, Step


class EngineLoop:
    """Runs one engine on one connected socket until either ends."""

    def __init__(self, sock: socket.socket, config: EngineConfig) -> None:
        self._link = FrontLink(sock)
        self._config = config

    def run(self) -> bool:
        """Whether the engine came as far as being ready."""
        try:
            engine = self._start()
            if depth_of(self._config, engine.ahead) > 1:
                self._run_ahead(engine)
            while True:
                self._turn(engine)
        except EngineError as error:
            self._link.send(Failed(error.reason, error.message, error.metadata))
            return False
        except GONE:
            return True

    def _run_ahead(self, engine: Engine) -> None:
        """Until the front is gone: raises one of GONE."""
        with closing(make_pipeline(engine)) as pipeline:
            while True:
                refused = self._link.apply(engine.submit, engine.cancel)
                landing = pipeline.turn()
                if landing is not None:
                    self._link.send(with_outputs(refused, engine.tell(landing)))
                elif not pipeline.busy:
                    self._link.send(engine.now(refused))
                    self._link.wait()
                elif refused:
                    self._link.send(engine.now(refused))

    def _start(self) -> Engine:
        with self._link.ends_with_front():
            self._link.send(Progress("start", STARTED))
            loaded = fitted(self._load(), self._config)
            engine = Engine(loaded, self._config, time.monotonic_ns)
            self._link.send(Progress("warm-up", WEIGHTS_TO))
            warm_up(engine)
            spare_collections()
        self._link.send(engine.ready())
        return engine

    def _load(self) -> LoadedModel:
        try:
            return load(self._config, lambda stage, fraction: self._link.send(Progress(stage, fraction)))
        except (EngineError, ConnectionError):
            raise
        except Exception as error:
            # Libraries raise anything for a folder that is wrong in a way nobody thought of.
            traceback.print_exc()
            raise load_failed(f"{type(error).__name__}: {error}") from error

    def _turn(self, engine: Engine) -> None:
        """One step, or, when there is nothing to do, the load once and then a wait for commands."""
        refused = self._link.apply(engine.submit, engine.cancel)
        if not engine.idle:
            self._link.send(with_outputs(refused, engine.step()))
            return
        self._link.send(engine.now(refused))
        self._link.wait()


def with_outputs(more: list[Output], step: Step) -> Step:
    """A step that also tells of others."""
    return msgspec.structs.replace(step, outputs=[*more, *step.outputs]) if more else step
