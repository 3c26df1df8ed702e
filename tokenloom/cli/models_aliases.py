"""`tokenloom models alias | promote | rollback | deprecate`: which version a name stands for."""

from __future__ import annotations

from typing import Annotated

import typer
from loom.modelstore.v1 import modelstore_pb2 as pb

from tokenloom.cli import models_changes as changes
from tokenloom.cli import models_json as plain
from tokenloom.cli import models_view as view
from tokenloom.cli.errors import CliError
from tokenloom.cli.models_changes import HISTORY_MAX, Change
from tokenloom.cli.models_common import (
    JsonOption,
    ModelArgument,
    StoreOption,
    TargetOption,
    find_model,
    out,
    resolve,
    with_modelstore,
)
from tokenloom.cli.modelstore import Modelstore
from tokenloom.contract.models import DEFAULT_ALIAS

CANARY = "canary"
LIMIT = 20

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The model.")]


def alias(
    name: NameArgument,
    alias: Annotated[str | None, typer.Argument(metavar="ALIAS", help="Such as stable.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET[=WEIGHT]…",
            help="A digest, 12 digits of it or more, or another alias; several share the traffic by weight.",
        ),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Take the alias away.")] = False,
    history: Annotated[bool, typer.Option("--history", help="List what it stood for; the default.")] = False,
    limit: Annotated[
        int, typer.Option(min=1, max=HISTORY_MAX, help="Changes of an alias to list, newest first.")
    ] = LIMIT,
    expect: Annotated[
        int | None,
        typer.Option(min=0, help="Only if the alias is at this change number; 0: only if it is new."),
    ] = None,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at versions, take it away, or list what it stood for."""
    if (delete or targets) and (history or (delete and targets)):
        raise CliError("give TARGETs, --delete or --history, one of them", status=2)
    if delete and alias is None:
        raise CliError(f"say which alias: `tokenloom models alias {name} ALIAS --delete`", status=2)
    if expect is not None and not (delete or targets):
        raise CliError("--expect goes with a TARGET or --delete", status=2)
    if alias is not None and targets:
        changed = with_modelstore(store, target, lambda m: _point(m, name, alias, targets, expect))
        _show_alias(name, changed, as_json=as_json)
    elif alias is not None and delete:
        with_modelstore(store, target, lambda m: _delete(m, name, alias, expect))
        if as_json:
            plain.print_json({"model": name, "alias": alias, "deleted": True})
        else:
            out.print(f"{name}@{alias} is deleted; its history stays", soft_wrap=True)
    else:
        found = with_modelstore(store, target, lambda m: _histories(m, name, alias, limit))
        _show_history(found, name, as_json=as_json)


async def _point(
    modelstore: Modelstore, name: str, alias: str, wanted: list[str], expect: int | None
) -> pb.Alias:
    shares = await changes.targets(modelstore, name, wanted)
    return await changes.set_targets(modelstore, name, alias, shares, expect)


async def _delete(modelstore: Modelstore, name: str, alias: str, expect: int | None) -> None:
    request = pb.DeleteAliasRequest(model=name, alias=alias, expected_sequence=expect)
    await modelstore.call("DeleteAlias", request)


def _show_alias(name: str, changed: pb.Alias, *, as_json: bool) -> None:
    if as_json:
        plain.print_json({"model": name, **plain.alias_json(changed)})
    else:
        line = f"{name}@{changed.name} is {view.shares(changed.targets)} (change {changed.sequence})"
        out.print(line, soft_wrap=True)


History = list[tuple[str, list[pb.Alias]]]
"""Aliases, and the changes of each, newest first."""


async def _histories(modelstore: Modelstore, name: str, alias: str | None, limit: int) -> History:
    model = await find_model(modelstore, name)
    wanted = [alias] if alias else [each.name for each in model.aliases]
    found = [(each, await changes.history(modelstore, name, each, limit)) for each in wanted]
    if alias and not found[0][1]:
        there = ", ".join(each.name for each in model.aliases) or "none"
        raise CliError(f"{name} never had an alias {alias!r} (there: {there})")
    return found


def _show_history(found: History, name: str, *, as_json: bool) -> None:
    newest = {(alias, listed[0].sequence) for alias, listed in found if listed and listed[0].targets}
    rows = [(alias, change) for alias, listed in found for change in listed]
    if as_json:
        plain.print_json(
            [
                {
                    "model": name,
                    **plain.alias_json(change),
                    "alias": alias,
                    "current": (alias, change.sequence) in newest,
                }
                for alias, change in rows
            ]
        )
    elif rows:
        out.print(view.history(rows, newest))
    else:
        out.print(f"{name} has no aliases: set one with `tokenloom models alias {name} ALIAS VERSION`")


def promote(
    name: NameArgument,
    source: Annotated[str, typer.Option("--from", help="The alias that was tried.")] = CANARY,
    to: Annotated[str, typer.Option("--to", help="The alias to point there.")] = DEFAULT_ALIAS,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point one alias at the version that another stands for."""
    change = with_modelstore(store, target, lambda m: changes.promote(m, name, source, to))
    _show_change(name, change, as_json=as_json)


def rollback(
    name: NameArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS")] = DEFAULT_ALIAS,
    to_change: Annotated[
        int | None,
        typer.Option(
            "--to-change", min=1, help="To this change; default: the last that stood for something else."
        ),
    ] = None,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set an alias to what it was before its last change."""
    change = with_modelstore(store, target, lambda m: changes.roll_back(m, name, alias, to_change))
    _show_change(name, change, as_json=as_json)


def _show_change(name: str, change: Change, *, as_json: bool) -> None:
    before, after = change.before, change.after
    if as_json:
        plain.print_json(
            {
                "model": name,
                **plain.alias_json(after),
                "changed": change.made,
                "previous": None if before is None else plain.targets_json(before.targets),
            }
        )
        return
    line = f"{name}@{after.name} is {view.shares(after.targets)}"
    if not change.made:
        line = f"{line} already: nothing changed"
    elif before is None:
        line = f"{line}, it is new (change {after.sequence})"
    else:
        line = f"{line}, was {view.shares(before.targets)} (change {after.sequence})"
    out.print(line, soft_wrap=True)


def deprecate(
    model: ModelArgument,
    message: Annotated[
        str | None, typer.Argument(metavar="MESSAGE", help="For callers: why, and what to use instead.")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take the mark away.")] = False,
    store: StoreOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Mark a version as deprecated: it is served as before, and callers are told."""
    if undo == (message is not None):
        raise CliError("give a MESSAGE, or --undo to take the mark away", status=2)

    async def run(modelstore: Modelstore) -> pb.Version:
        digest = (await resolve(modelstore, model)).digest
        request = pb.SetDeprecationRequest(digest=digest, message=message or "", deprecated=not undo)
        version: pb.Version = (await modelstore.call("SetDeprecation", request)).version
        return version

    version = with_modelstore(store, target, run)
    if as_json:
        plain.print_json(plain.version_json(version))
        return
    named = f"{version.manifest.name}@{view.short(version.digest)}"
    line = f"{named} is no longer deprecated" if undo else f"{named} is deprecated: {message}"
    out.print(line, soft_wrap=True, markup=False)
