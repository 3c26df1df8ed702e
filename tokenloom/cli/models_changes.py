"""What a change of an alias is to be: shares, promotion, rollback. Reads the store, prints nothing.

Each change is compared with what was read: when somebody else changed the alias meanwhile, the store
refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loom.modelstore.v1 import modelstore_pb2 as pb

from tokenloom.cli.errors import CliError
from tokenloom.cli.models_common import find_model, resolve, version_reference
from tokenloom.cli.models_view import shares
from tokenloom.cli.modelstore import Modelstore
from tokenloom.kit.errors import CallError

HISTORY_MAX = 1000
"""Changes that a rollback looks back over; the store lists no more at once."""
WEIGHT_MAX = 1_000_000
"""The store takes no more."""


@dataclass(frozen=True)
class Change:
    """An alias before and after. `before` is None when there was none; equal targets: nothing was done."""

    before: pb.Alias | None
    after: pb.Alias

    @property
    def made(self) -> bool:
        """Whether the store was changed."""
        return self.before is None or self.before.sequence != self.after.sequence


def parse_share(text: str) -> tuple[str, int]:
    """`9f3a0c1b2d4e=90` as version and weight; without `=` the weight is 1. Raises CliError."""
    version, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1
    if not version:
        raise CliError(f"{text}: give VERSION=WEIGHT, as canary=10", status=2)
    if not (weight.isascii() and weight.isdigit()) or not 1 <= int(weight) <= WEIGHT_MAX:
        raise CliError(f"{text}: the weight must be a whole number, 1 to {WEIGHT_MAX:,}", status=2)
    return version, int(weight)


async def targets(modelstore: Modelstore, name: str, wanted: Iterable[str]) -> list[pb.AliasTarget]:
    """Shares of versions; those named twice are added up. Raises CliError and CallError."""
    weights: dict[str, int] = {}
    for version, weight in [parse_share(text) for text in wanted]:
        digest = (await resolve(modelstore, f"{name}@{version_reference(version)}")).digest
        weights[digest] = weights.get(digest, 0) + weight
    return [pb.AliasTarget(digest=digest, weight=weight) for digest, weight in weights.items()]


async def history(modelstore: Modelstore, name: str, alias: str, limit: int) -> list[pb.Alias]:
    """What the alias stood for, newest first; empty when it never was. Raises CallError."""
    request = pb.ListAliasHistoryRequest(model=name, alias=alias, limit=limit)
    try:
        return list((await modelstore.call("ListAliasHistory", request)).changes)
    except CallError as error:
        if error.reason != "MODEL_NOT_FOUND":
            raise
        return []


async def set_targets(
    modelstore: Modelstore, name: str, alias: str, wanted: Sequence[pb.AliasTarget], expected: int | None
) -> pb.Alias:
    """The alias as it is then. Raises CallError."""
    request = pb.SetAliasRequest(model=name, alias=alias, targets=wanted, expected_sequence=expected)
    changed: pb.Alias = (await modelstore.call("SetAlias", request)).alias
    return changed


async def promote(modelstore: Modelstore, name: str, source: str, target: str) -> Change:
    """Point `target` at what `source` is. Raises CliError when `source` is not one version, and CallError."""
    if source == target:
        raise CliError(f"--from and --to are both {source!r}", status=2)
    model = await find_model(modelstore, name)
    found = next((alias for alias in model.aliases if alias.name == source), None)
    if found is None:
        there = ", ".join(alias.name for alias in model.aliases) or "none"
        raise CliError(
            f"{name} has no alias {source!r} (there: {there}): "
            f"set it with `tokenloom models alias {name} {source} VERSION`, or give --from"
        )
    if len(found.targets) != 1:
        raise CliError(
            f"{name}@{source} is several versions ({shares(found.targets)}): "
            f"say which with `tokenloom models alias {name} {target} VERSION`"
        )
    return await _move(modelstore, name, target, list(found.targets))


async def _move(modelstore: Modelstore, name: str, alias: str, wanted: list[pb.AliasTarget]) -> Change:
    before = next(iter(await history(modelstore, name, alias, 1)), None)
    wanted = [pb.AliasTarget(digest=target.digest, weight=1) for target in wanted]
    if before is not None and same(before.targets, wanted):
        return Change(before, before)
    expected = before.sequence if before is not None else 0
    return Change(before, await set_targets(modelstore, name, alias, wanted, expected))


async def roll_back(modelstore: Modelstore, name: str, alias: str, to_change: int | None) -> Change:
    """The alias as it was before its last change, or after change `to_change`. Raises CliError, CallError."""
    await find_model(modelstore, name)
    changes = await history(modelstore, name, alias, HISTORY_MAX)
    if not changes:
        raise CliError(f"{name} never had an alias {alias!r}: see `tokenloom models alias {name}`")
    earlier = before_last(changes) if to_change is None else _change(changes, to_change)
    if earlier is None:
        why = "it stood for something else at no earlier change" if to_change is None else "see its history"
        raise CliError(
            f"{name}@{alias} cannot be rolled back{'' if to_change is None else f' to change {to_change}'}: "
            f"{why} (`tokenloom models alias {name} {alias} --history`)"
        )
    now = changes[0]
    if same(now.targets, earlier.targets):
        return Change(now, now)
    after = await set_targets(modelstore, name, alias, earlier.targets, now.sequence)
    return Change(now, after)


def before_last(changes: Sequence[pb.Alias]) -> pb.Alias | None:
    """Of changes, newest first, the last that stood for something else; None when there is none.

    A change that took the alias away is passed over: nothing is rolled back to nothing.
    """
    now = changes[0]
    return next((c for c in changes[1:] if c.targets and not same(c.targets, now.targets)), None)


def _change(changes: Sequence[pb.Alias], sequence: int) -> pb.Alias | None:
    return next((c for c in changes if c.sequence == sequence and c.targets), None)


def same(one: Iterable[pb.AliasTarget], other: Iterable[pb.AliasTarget]) -> bool:
    """Whether traffic is divided the same way, in whatever numbers it is written."""
    return _parts(one) == _parts(other)


def _parts(found: Iterable[pb.AliasTarget]) -> dict[str, float]:
    weights = {target.digest: target.weight or 1 for target in found}
    whole = sum(weights.values())
    return {digest: weight / whole for digest, weight in weights.items()}
