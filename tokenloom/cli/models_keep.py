"""`tokenloom models rm | gc | verify`: what the store keeps, and whether it is whole."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from loom.modelstore.v1 import modelstore_pb2 as pb

from tokenloom.cli import models_json as plain
from tokenloom.cli import models_workers as workers
from tokenloom.cli.columns import count
from tokenloom.cli.errors import CliError
from tokenloom.cli.models_common import (
    JsonOption,
    StoreOption,
    TargetOption,
    YesOption,
    at_place,
    confirm,
    duration_ms,
    err,
    find_model,
    is_digest,
    list_models,
    model_reference,
    out,
    resolve,
    with_modelstore,
)
from tokenloom.cli.models_progress import BytesProgress, size
from tokenloom.cli.models_view import short
from tokenloom.cli.modelstore import Modelstore, Place, find_modelstore, is_of_running_mesh

GC_MAX_S = 3600.0
"""A store with very many blobs takes a while to look through."""
BLOBS_LISTED_MAX = 20
"""Blobs that are listed for people; programs get all."""


@dataclass(frozen=True)
class Doomed:
    """What `rm` deletes: aliases first, then versions."""

    name: str
    aliases: tuple[pb.Alias, ...]
    versions: tuple[pb.Version, ...]

    def plain(self) -> dict[str, Any]:
        """For programs."""
        return {
            "model": self.name,
            "aliases": [alias.name for alias in self.aliases],
            "versions": [version.digest for version in self.versions],
        }

    def __str__(self) -> str:
        bytes_ = sum(file.size_bytes for version in self.versions for file in version.manifest.files)
        listed = ", ".join(short(version.digest) for version in self.versions) or "no versions"
        if not self.name:
            return f"{listed}, whose manifest is damaged"
        of = f"{self.name}: {listed} ({size(bytes_)})"
        return of + (f", aliases {', '.join(a.name for a in self.aliases)}" if self.aliases else "")


def rm(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME[@DIGEST]…",
            help="Versions; a NAME alone: its aliases and all versions; `sha256:…` alone: one that `verify` "
            "calls damaged and no list shows.",
        ),
    ],
    yes: YesOption = False,
    force: Annotated[bool, typer.Option("--force", help="Also while a worker has it resident.")] = False,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete versions, or whole models. Their bytes go with the next `gc`."""
    place = find_modelstore(target, store)
    doomed = at_place(place, lambda m: _choose(m, models))
    if not force:
        _refuse_resident(place, doomed)
    confirm(f"Delete {'; '.join(map(str, doomed))}?", yes=yes)

    async def run(modelstore: Modelstore) -> None:
        for each in doomed:
            await _delete(modelstore, each)
            if not as_json:
                out.print(f"deleted {each}", soft_wrap=True, markup=False)

    at_place(place, run)
    if as_json:
        plain.print_json([each.plain() for each in doomed])
    else:
        out.print("the bytes go with the next `tokenloom models gc`", style="dim", soft_wrap=True)


async def _choose(modelstore: Modelstore, models: Sequence[str]) -> list[Doomed]:
    """What the words name. Raises CliError for a version that an alias names."""
    found: dict[str, Doomed] = {}
    for text in models:
        name, at, version = text.partition("@")
        if is_digest(text):
            found[text] = await _unlisted(modelstore, text)
            continue
        model = await find_model(modelstore, name)
        if not at:
            found[name] = Doomed(name, tuple(model.aliases), tuple(model.versions))
            continue
        if not model_reference(text).startswith(f"{name}@sha256:"):
            raise CliError(
                f"{text}: rm takes NAME@DIGEST; an alias goes with "
                f"`tokenloom models alias {name} {version} --delete`",
                status=2,
            )
        wanted = await resolve(modelstore, text)
        known = found.get(name, Doomed(name, (), ()))
        if wanted.digest not in [each.digest for each in known.versions]:
            found[name] = Doomed(name, known.aliases, (*known.versions, wanted))
    for each in found.values():
        if each.name:
            _refuse_named(await find_model(modelstore, each.name), each)
    return list(found.values())


async def _unlisted(modelstore: Modelstore, digest: str) -> Doomed:
    """A version that the store has and does not list. Raises CliError for one that is listed."""
    for model in await list_models(modelstore):
        if any(version.digest == digest for version in model.versions):
            raise CliError(f"{digest} is listed: give it as {model.name}@{short(digest)}", status=2)
    return Doomed("", (), (pb.Version(digest=digest),))


def _refuse_named(model: pb.Model, doomed: Doomed) -> None:
    going = {alias.name for alias in doomed.aliases}
    for version in doomed.versions:
        naming = [
            f"{model.name}@{alias.name}"
            for alias in model.aliases
            if alias.name not in going and any(t.digest == version.digest for t in alias.targets)
        ]
        if naming:
            raise CliError(
                f"MODEL_IN_USE: {version.digest} is named by {', '.join(naming)}: "
                "point the alias at another version first"
            )


def _refuse_resident(place: Place, doomed: Sequence[Doomed]) -> None:
    """Raises CliError while a worker of the running mesh has one of the versions."""
    if not is_of_running_mesh(place):
        return
    seen = asyncio.run(workers.look(workers.running()))
    for each in doomed:
        for version in each.versions:
            holding = [r for r in seen.of(version.digest) if r.state != "failed"]
            if holding:
                short_name = f"{each.name}@{short(version.digest)}"
                raise CliError(
                    f"MODEL_IN_USE: {short_name} is resident on {workers.names(holding)}: "
                    f"unload it with `tokenloom models unload {short_name}`, or give --force"
                )
    if seen.silent:
        silent = ", ".join(worker.name for worker in seen.silent)
        raise CliError(f"{silent} did not say what is resident there: try again, or give --force")


async def _delete(modelstore: Modelstore, doomed: Doomed) -> None:
    for alias in doomed.aliases:
        await modelstore.call(
            "DeleteAlias",
            pb.DeleteAliasRequest(model=doomed.name, alias=alias.name, expected_sequence=alias.sequence),
        )
    for version in doomed.versions:
        await modelstore.call("DeleteVersion", pb.DeleteVersionRequest(digest=version.digest))


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    min_age: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", help="Keep what is younger: 90s, 30m, 1h, 2d. Default: the store's setting."
        ),
    ] = None,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete stored bytes that no version needs any more."""
    # 0 would mean the store's setting.
    min_age_ms = 0 if min_age is None else max(duration_ms(min_age, "--min-age"), 1)

    async def run(modelstore: Modelstore) -> pb.CollectGarbageResponse:
        request = pb.CollectGarbageRequest(dry_run=dry_run, min_age_ms=min_age_ms)
        answer: pb.CollectGarbageResponse = await modelstore.call(
            "CollectGarbage", request, timeout_s=GC_MAX_S
        )
        return answer

    done = with_modelstore(store, target, run)
    if as_json:
        plain.print_json(
            {
                "dry_run": dry_run,
                "deleted": [plain.file_json(file) for file in done.deleted],
                "deleted_bytes": done.deleted_bytes,
                "kept_blobs": done.kept_blobs,
                "kept_bytes": done.kept_bytes,
                "spared_blobs": done.spared_blobs,
            }
        )
        return
    _show_garbage(done, dry_run)


def _show_garbage(done: pb.CollectGarbageResponse, dry_run: bool) -> None:
    for file in done.deleted[:BLOBS_LISTED_MAX]:
        out.print(f"{short(file.digest) or file.path}  {size(file.size_bytes):>9}", soft_wrap=True)
    if len(done.deleted) > BLOBS_LISTED_MAX:
        out.print(f"… and {count(len(done.deleted) - BLOBS_LISTED_MAX)} more")
    verb = "would be deleted" if dry_run else "deleted"
    line = f"{_blobs(len(done.deleted))}, {size(done.deleted_bytes)}, {verb}; "
    line += f"{_blobs(done.kept_blobs)}, {size(done.kept_bytes)}, kept"
    if done.spared_blobs:
        line += f"; {_blobs(done.spared_blobs)} that no version needs spared: too young, or part of an import"
    out.print(line, soft_wrap=True)


def _blobs(number: int) -> str:
    return _count(number, "blob")


def _count(number: int, what: str) -> str:
    return f"{count(number)} {what}{'' if number == 1 else 's'}"


def verify(
    model: Annotated[
        str | None, typer.Argument(help="NAME, NAME@ALIAS or NAME@DIGEST; all of the store when left out.")
    ] = None,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read what is stored and compare it with its digests; exit status 1 when something is damaged."""
    request = pb.VerifyRequest(model=model_reference(model) if model else "")

    async def run(modelstore: Modelstore) -> tuple[pb.Verified, list[dict[str, Any]]]:
        cures = Cures(await list_models(modelstore))
        damaged: list[dict[str, Any]] = []
        with BytesProgress(err, hidden=as_json) as progress:
            async for response in modelstore.stream("Verify", request):
                match response.WhichOneof("event"):
                    case "progress":
                        step = response.progress
                        progress.show(step.stage, step.done_bytes, step.total_bytes)
                    case "damaged":
                        damaged.append(cures.of(response.damaged))
                    case "verified":
                        return response.verified, damaged
        raise CliError("the verification ended without a result")

    done, damaged = with_modelstore(store, target, run)
    if as_json:
        figures = {"versions": done.versions, "blobs": done.blobs, "bytes": done.bytes}
        plain.print_json({**figures, "damaged": damaged})
    else:
        for each in damaged:
            out.print(f"{each['digest']}: {each['problem']}", style="red", soft_wrap=True, markup=False)
            out.print(f"  {each['cure']}", soft_wrap=True, markup=False)
        out.print(
            f"{_blobs(done.blobs)}, {size(done.bytes)}, of {_count(done.versions, 'version')} read",
            soft_wrap=True,
        )
    if done.damaged or damaged:
        raise CliError(f"{_blobs(done.damaged or len(damaged))} damaged")


class Cures:
    """What mends a damaged blob, from what the catalogue says of the versions that need it."""

    def __init__(self, models: Sequence[pb.Model]) -> None:
        self._versions = {version.digest: version for model in models for version in model.versions}

    def of(self, damaged: pb.Damaged) -> dict[str, Any]:
        """`{"digest", "problem", "versions", "cure"}`."""
        known = [self._versions[digest] for digest in damaged.versions if digest in self._versions]
        again = "import it again"
        if known:
            again += ": " + "; ".join(dict.fromkeys(map(_import_of, known)))
        if damaged.digest in damaged.versions:
            again += f"; without its source: `tokenloom models rm {damaged.digest}`"
        cure = again if damaged.versions else "no version needs it: `tokenloom models gc` deletes it"
        return {
            "digest": damaged.digest,
            "problem": damaged.problem,
            "versions": list(damaged.versions),
            "cure": cure,
        }


def _import_of(version: pb.Version) -> str:
    """The store keeps the source's name, not where it was."""
    manifest = version.manifest
    source = manifest.provenance.get("source", "")
    where = source if source.startswith("builtin:") else "SRC"
    dtype = f" --dtype {manifest.dtype}" if manifest.parameters else ""
    command = f"`tokenloom models import {where} --name {manifest.name}{dtype}`"
    return f"{command}, where SRC is {source or 'its source'}" if where == "SRC" else command
