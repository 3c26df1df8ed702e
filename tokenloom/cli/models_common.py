"""What the `tokenloom models` commands share: options, consoles, how a model is named, how a call is made.

Knows no command. A `NAME@DIGITS` as tables show it is understood wherever a model is asked for.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer
from loom.modelstore.v1 import modelstore_pb2 as pb
from rich.console import Console

from tokenloom.cli.errors import CliError
from tokenloom.cli.modelstore import Modelstore, Place, connect, explain, find_modelstore
from tokenloom.contract.models import DIGEST_HEX, DIGEST_HEX_MIN
from tokenloom.kit.errors import CallError

PIPE_COLUMNS = 1000
"""Into a pipe nothing is cut: whoever reads it there wants whole lines."""

out = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
err = Console(stderr=True, highlight=False)

T = TypeVar("T")

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store", help="Work on this folder, or s3:// gs:// az:// URL, without a mesh.", show_default=False
    ),
]
TargetOption = Annotated[
    str | None, typer.Option("--target", help="host:port of a modelstore.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
ModelArgument = Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME@DIGEST.")]

_HEX = re.compile(r"[0-9a-f]+")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def version_reference(text: str) -> str:
    """What follows the `@`: digits alone are a digest's beginning, anything else is an alias or a digest."""
    is_hex = len(text) >= DIGEST_HEX_MIN and _HEX.fullmatch(text)
    return f"sha256:{text}" if is_hex else text


def model_reference(text: str) -> str:
    """A model as the store names it: `NAME@9f3a0c1b2d4e` becomes `NAME@sha256:9f3a0c1b2d4e`."""
    name, at, version = text.partition("@")
    return f"{name}@{version_reference(version)}" if at else text


def is_digest(text: str) -> bool:
    """Whether it is `sha256:` and 64 hex digits."""
    digits = text.removeprefix("sha256:")
    return digits != text and len(digits) == DIGEST_HEX and bool(_HEX.fullmatch(digits))


def whole_digest(text: str) -> str:
    """`sha256:` and 64 digits, of either form. Raises CliError for anything else."""
    digits = text.strip().lower().removeprefix("sha256:")
    if len(digits) != DIGEST_HEX or not _HEX.fullmatch(digits):
        raise CliError(f"--sha256 {text}: give the {DIGEST_HEX} hex digits of the file's SHA-256", status=2)
    return f"sha256:{digits}"


def duration_ms(text: str, option: str) -> int:
    """`90s`, `30m`, `1h`, `2d` in milliseconds. Raises CliError for anything else."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise CliError(f"{option} {text}: give a number and a unit, as 90s, 30m, 1h or 2d", status=2)
    return round(float(found[1]) * _UNITS_MS[found[2]])


async def list_models(modelstore: Modelstore) -> list[pb.Model]:
    """The whole catalogue."""
    return list((await modelstore.call("ListModels", pb.ListModelsRequest())).models)


async def find_model(modelstore: Modelstore, name: str) -> pb.Model:
    """The model of this name. Raises CliError that says which there are."""
    models = await list_models(modelstore)
    for model in models:
        if model.name == name:
            return model
    there = ", ".join(sorted(model.name for model in models)) or "none"
    raise CliError(f"no model named {name!r} (there: {there})")


async def resolve(modelstore: Modelstore, model: str) -> pb.Version:
    """The one version that `NAME[@ALIAS|@DIGEST]` stands for. Raises CallError."""
    request = pb.ResolveModelRequest(model=model_reference(model))
    version: pb.Version = (await modelstore.call("ResolveModel", request)).version
    return version


def with_modelstore(
    store: str | None, target: str | None, work: Callable[[Modelstore], Coroutine[Any, Any, T]]
) -> T:
    """What `work` gives with the modelstore that was meant. Raises CliError in place of CallError."""
    return at_place(find_modelstore(target, store), work)


def at_place(place: Place, work: Callable[[Modelstore], Coroutine[Any, Any, T]]) -> T:
    """As `with_modelstore`, where the place is known already."""

    async def run() -> T:
        async with connect(place) as modelstore:
            return await work(modelstore)

    try:
        return asyncio.run(run())
    except CallError as error:
        raise CliError(explain(error, place)) from None
    except OSError as error:
        raise CliError(f"the store {place}: {' '.join(str(error).split())}") from None


def is_interactive() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is deleted. Raises CliError when the answer is no, or when nobody can answer."""
    if yes:
        return
    if not is_interactive():
        raise CliError(f"{question} Nobody is there to answer: give --yes", status=2)
    if not typer.confirm(question, err=True):
        raise CliError("nothing was deleted")
