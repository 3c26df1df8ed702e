"""What a person sees while a mesh starts and runs: a line for each process, then the addresses."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tokenloom.cli import local, state
from tokenloom.cli.supervisor import Event


class StartupView:
    """Shows events: live rows on a terminal while the mesh starts, plain lines otherwise and later."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._began_s = clock()
        self._rows: dict[str, RenderableType] = {}
        self._notes: list[str] = []
        self._live: Live | None = None
        self.up = False

    def __enter__(self) -> StartupView:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=12, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_live()

    def on_event(self, event: Event) -> None:
        """Show one event."""
        if event.kind == "up":
            self._end_live()
            self.up = True
            for note in self._notes:
                self._console.print(Text(note, "yellow"), soft_wrap=True)
            self._console.print(self._summary(event.detail))
        elif event.kind == "note":
            self._notes.append(event.detail)
        elif self._live is not None:
            self._rows[event.name] = _row(event)
            self._live.update(Group(*self._rows.values()))
        elif event.kind in ("ready", "died", "loaded") or (event.kind == "started" and self.up):
            self._console.print(_line(event), soft_wrap=True)

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _summary(self, address: str) -> RenderableType:
        mesh = state.read(local.state_file())
        table = Table.grid(padding=(0, 2))
        table.add_row("gRPC", Text(address, style="bold"), "loom.inference.v1.InferenceService")
        table.add_row("HTTP", Text(f"http://{address}/v1", style="bold"), "OpenAI-compatible")
        table.add_row("models", ", ".join(mesh.models) if mesh else "", "")
        table.add_row("logs", str(local.logs_dir()), "tokenloom logs")
        table.add_row("traces", str(local.traces_file()), "tokenloom trace --last")
        took = Text(f"the mesh is up after {self._clock() - self._began_s:.1f} s", style="green")
        hint = Text('try: tokenloom generate "What is the capital of France?"', style="dim")
        return Group(took, table, hint)


def _row(event: Event) -> RenderableType:
    """One process while the mesh starts, on a terminal."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2)
    table.add_column(width=12)
    match event.kind:
        case "ready":
            table.add_row(Text("✓", "green"), event.name, Text(f"ready after {event.seconds:.1f} s", "dim"))
        case "loaded":
            told = f"{event.detail}, loaded after {event.seconds:.1f} s"
            table.add_row(Text("✓", "green"), event.name, Text(told, "dim"))
        case "died" | "failed":
            table.add_row(Text("✗", "red"), event.name, Text(event.detail.splitlines()[0], "red"))
        case _:
            table.add_row(Spinner("dots"), event.name, Text(event.detail or "starting", "dim"))
    return table


def _line(event: Event) -> Text:
    """One event as a plain line."""
    match event.kind:
        case "ready":
            return Text(f"{event.name} is ready after {event.seconds:.1f} s (pid {event.pid})", "green")
        case "loaded":
            return Text(f"{event.detail} loaded after {event.seconds:.1f} s", "green")
        case "died":
            again = f"starting it again on the same ports in {event.seconds:.1f} s"
            return Text(f"{event.name} (pid {event.pid}) died: {event.detail}; {again}", "red")
        case _:
            return Text(f"{event.name} started (pid {event.pid})", "dim")
