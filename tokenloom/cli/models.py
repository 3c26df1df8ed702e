"""`tokenloom models …`: the store's models and what the mesh's workers have of them.

Here are import, list and show; the other subcommands are in `models_aliases` (what a name stands for),
`models_keep` (what is kept) and `models_load` (what is resident).
"""

from __future__ import annotations

import asyncio
import os
from enum import StrEnum
from typing import Annotated

import typer
from loom.modelstore.v1 import modelstore_pb2 as pb

from tokenloom.cli import local, models_aliases, models_keep, models_load
from tokenloom.cli import models_json as plain
from tokenloom.cli import models_view as view
from tokenloom.cli import models_workers as workers
from tokenloom.cli.errors import CliError
from tokenloom.cli.models_common import (
    JsonOption,
    ModelArgument,
    StoreOption,
    TargetOption,
    at_place,
    err,
    list_models,
    out,
    resolve,
    whole_digest,
)
from tokenloom.cli.models_progress import BytesProgress
from tokenloom.cli.modelstore import Modelstore, Place, find_modelstore, is_of_running_mesh

app = typer.Typer(
    help="Import models, say which version is served, and which are resident.", no_args_is_help=True
)


class Dtype(StrEnum):
    """What weights are stored as."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="GGUF file, Hugging Face folder, http(s) URL of either (a folder's ends in /), builtin:sim.",
    ),
]


@app.command("import")
def import_(
    source: SourceArgument,
    name: Annotated[str, typer.Option(help="What the model is called from now on.")],
    dtype: Annotated[Dtype, typer.Option(help="What the weights are stored as.")] = Dtype.bfloat16,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="Point this alias at the version; may be repeated. Default: stable, if it is new."),
    ] = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="What the file must be; for a source of one file.")
    ] = None,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a model and put it into the store."""
    location = source if source.startswith("builtin:") or "://" in source else os.path.abspath(source)
    request = pb.ImportModelRequest(
        source=location,
        name=name,
        dtype=dtype.value,
        aliases=alias or (),
        source_digest="" if sha256 is None else whole_digest(sha256),
    )

    async def run(modelstore: Modelstore) -> pb.Imported:
        with BytesProgress(err, hidden=as_json) as progress:
            async for response in modelstore.stream("ImportModel", request):
                if response.HasField("imported"):
                    imported: pb.Imported = response.imported
                    return imported
                step = response.progress
                progress.show(step.stage, step.done_bytes, step.total_bytes)
        raise CliError("the import ended without a version")

    imported = at_place(_importing_place(source, store, target), run)
    if as_json:
        plain.print_json({"created": imported.created, **plain.version_json(imported.version)})
    else:
        out.print(view.imported_line(imported), soft_wrap=True)


def _importing_place(source: str, store: str | None, target: str | None) -> Place:
    """A modelstore fetches only the URLs that its settings allow; in this user's own folder this process
    fetches them, with the user's own rights, and a mesh that runs on the folder sees the version soon after.
    """
    is_url = source.startswith(("http://", "https://"))
    if is_url and target is None and store is None:
        return Place(None, str(local.store_dir()))
    return find_modelstore(target, store)


@app.command("list")
def list_(store: StoreOption = None, target: TargetOption = None, as_json: JsonOption = False) -> None:
    """List models, their versions and aliases, and where they are resident."""
    place = find_modelstore(target, store)
    models = at_place(place, list_models)
    seen = look(place)
    residents = None if seen is None else seen.by_version()
    if as_json:
        plain.print_json([plain.model_json(model, residents) for model in models])
    elif any(model.versions for model in models):
        out.print(view.listing(models, residents, out.width))
    else:
        out.print("no models: import one with `tokenloom models import SRC --name NAME`")


@app.command()
def show(
    model: ModelArgument,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the digest.")] = False,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one version: what it is, where it came from, its files, its memory."""
    if quiet and as_json:
        raise CliError("give --quiet or --json, not both", status=2)
    place = find_modelstore(target, store)

    async def run(modelstore: Modelstore) -> tuple[pb.Version, pb.Model]:
        version = await resolve(modelstore, model)
        models = await list_models(modelstore)
        return version, next(m for m in models if m.name == version.manifest.name)

    version, found = at_place(place, run)
    if quiet:
        print(version.digest)
        return
    seen = look(place)
    residences = None if seen is None else seen.of(version.digest)
    if as_json:
        plain.print_json({**plain.version_json(version, residences), "aliases": plain.aliases_json(found)})
    else:
        out.print(view.details(version, found, residences))


def look(place: Place) -> workers.Seen | None:
    """What the running mesh's workers have; None when the place is not of a running mesh."""
    if not is_of_running_mesh(place):
        return None
    seen = asyncio.run(workers.look(workers.running()))
    for silent in seen.silent:
        err.print(f"{silent.name} did not say what is resident there", style="yellow")
    return seen


app.command("alias")(models_aliases.alias)
app.command("promote")(models_aliases.promote)
app.command("rollback")(models_aliases.rollback)
app.command("deprecate")(models_aliases.deprecate)
app.command("load")(models_load.load)
app.command("unload")(models_load.unload)
app.command("rm")(models_keep.rm)
app.command("gc")(models_keep.gc)
app.command("verify")(models_keep.verify)
