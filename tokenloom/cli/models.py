"""`tokenloom models import | list | show | alias`: the store's models, for people and for programs."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from loom.modelstore.v1 import modelstore_pb2 as pb
from rich.console import Console

from tokenloom.cli import models_view as view
from tokenloom.cli.errors import CliError
from tokenloom.cli.modelstore import Modelstore, Place, connect, explain, find_modelstore
from tokenloom.contract.models import DIGEST_HEX_MIN
from tokenloom.kit.errors import CallError

PIPE_COLUMNS = 200

app = typer.Typer(help="Import models and say which version is served.", no_args_is_help=True)

# Into a pipe nothing is cut: whoever reads it there wants whole digests.
out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
err = Console(stderr=True, highlight=False)

T = TypeVar("T")


class Dtype(StrEnum):
    """What weights are stored as."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


SourceArgument = Annotated[
    str, typer.Argument(metavar="SRC", help="GGUF file, Hugging Face folder or builtin:sim.")
]
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Work on this folder, without a mesh.", show_default=False),
]
TargetOption = Annotated[
    str | None, typer.Option("--target", help="host:port of a modelstore.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("import")
def import_(
    source: SourceArgument,
    name: Annotated[str, typer.Option(help="What the model is called from now on.")],
    dtype: Annotated[Dtype, typer.Option(help="What the weights are stored as.")] = Dtype.bfloat16,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="Point this alias at the version; may be repeated. Default: stable, if it is new."),
    ] = None,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a model and put it into the store."""
    location = source if source.startswith("builtin:") or "://" in source else os.path.abspath(source)
    request = pb.ImportModelRequest(source=location, name=name, dtype=dtype.value, aliases=alias or ())

    async def run(modelstore: Modelstore) -> pb.Imported:
        with view.ImportProgress(err, hidden=as_json) as progress:
            async for response in modelstore.stream("ImportModel", request):
                if response.HasField("imported"):
                    imported: pb.Imported = response.imported
                    return imported
                progress.show(response.progress)
        raise CliError("the import ended without a version")

    imported = _with_modelstore(store, target, run)
    if as_json:
        view.print_json({"created": imported.created, **view.version_json(imported.version)})
    else:
        out.print(view.imported_line(imported), soft_wrap=True)


@app.command("list")
def list_(store: StoreOption = None, target: TargetOption = None, as_json: JsonOption = False) -> None:
    """List models, their versions and aliases."""
    models = _with_modelstore(store, target, _models)
    if as_json:
        view.print_json([view.model_json(model) for model in models])
    elif models:
        out.print(view.table(models))
    else:
        out.print("no models: import one with `tokenloom models import SRC --name NAME`")


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME@sha256:DIGEST.")],
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one version: what it is, where it came from, its files."""

    async def run(modelstore: Modelstore) -> tuple[pb.Version, pb.Model]:
        resolved = await modelstore.call("ResolveModel", pb.ResolveModelRequest(model=model))
        version: pb.Version = resolved.version
        models = await _models(modelstore)
        return version, next(m for m in models if m.name == version.manifest.name)

    version, found = _with_modelstore(store, target, run)
    if as_json:
        view.print_json({**view.version_json(version), "aliases": view.aliases_json(found)})
    else:
        out.print(view.details(version, found))


@app.command("alias")
def alias_(
    name: Annotated[str, typer.Argument(help="The model.")],
    alias: Annotated[str, typer.Argument(help="The alias to set, e.g. stable.")],
    version: Annotated[str, typer.Argument(help="A digest, its first 12 digits or more, or another alias.")],
    expect: Annotated[
        int | None, typer.Option(min=0, help="Only if the alias is at this change number; 0: only if new.")
    ] = None,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version."""
    wanted = f"{name}@{version_reference(version)}"

    async def run(modelstore: Modelstore) -> pb.Alias:
        resolved = await modelstore.call("ResolveModel", pb.ResolveModelRequest(model=wanted))
        request = pb.SetAliasRequest(model=name, alias=alias, expected_sequence=expect)
        request.targets.add(digest=resolved.version.digest, weight=1)
        changed: pb.Alias = (await modelstore.call("SetAlias", request)).alias
        return changed

    changed = _with_modelstore(store, target, run)
    if as_json:
        view.print_json({"model": name, **view.alias_json(changed)})
    else:
        out.print(f"{name}@{alias} is {view.short(changed.targets[0].digest)} (change {changed.sequence})")


def version_reference(text: str) -> str:
    """What follows the `@`: digits alone are a digest's beginning, anything else is an alias or a digest."""
    is_hex = len(text) >= DIGEST_HEX_MIN and set(text) <= set("0123456789abcdef")
    return f"sha256:{text}" if is_hex else text


async def _models(modelstore: Modelstore) -> list[pb.Model]:
    return list((await modelstore.call("ListModels", pb.ListModelsRequest())).models)


def _with_modelstore(
    store: Path | None, target: str | None, work: Callable[[Modelstore], Coroutine[Any, Any, T]]
) -> T:
    place = find_modelstore(target, store)

    async def run() -> T:
        async with connect(place) as modelstore:
            return await work(modelstore)

    return _explained(run, place)


def _explained(run: Callable[[], Coroutine[Any, Any, T]], place: Place) -> T:
    try:
        return asyncio.run(run())
    except CallError as error:
        raise CliError(explain(error, place)) from None
