"""Which models the workers of a local mesh begin with: those asked for, or the first that the store has.

Whatever else is in the store is loaded when it is asked for. Bound: `LOADED_MAX` of those not asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import grpc
from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.modelstore.v1 import modelstore_pb2_grpc as rpc

from tokenloom.cli.errors import CliError
from tokenloom.contract.models import DEFAULT_ALIAS, parse_model
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import from_rpc_error

SIM_SOURCE = "builtin:sim"
SIM_NAME = "sim"
LOADED_MAX = 8
"""Models that are loaded at the start though nobody named them; a worker holds no more by default."""
CALL_S = 30.0


@dataclass(frozen=True)
class Chosen:
    """What a mesh begins with."""

    served: tuple[str, ...]
    """All that are meant to be asked for, loaded or not."""
    required: tuple[str, ...] = ()
    """Workers are ready when they have these."""
    first: Mapping[str, str] = field(default_factory=dict)
    """Digests by name of those to be loaded then, as far as they fit together."""


async def models_to_load(target: str, engine: str, wanted: Sequence[str]) -> Chosen:
    """What to load. Imports the model without weights for `sim` when there is none.

    One that is alone, or was asked for, is required; of several that nobody named, the first few are tried.
    Raises CliError, with the cure, when there is nothing to serve.
    """
    channel = open_channel(target)
    try:
        stub = rpc.ModelStoreServiceStub(channel)
        listed = await stub.ListModels(pb.ListModelsRequest(), timeout=CALL_S)
        stored = {m.name: is_sim(m) for m in listed.models if m.versions}
        if engine == "sim" and not stored and not wanted:
            request = pb.ImportModelRequest(source=SIM_SOURCE, name=SIM_NAME)
            async for _ in stub.ImportModel(request, timeout=CALL_S):
                pass
            return Chosen((SIM_NAME,), (SIM_NAME,))
        nameless = {m.name for m in listed.models if not any(a.name == DEFAULT_ALIAS for a in m.aliases)}
        names = choose(stored, engine, wanted, nameless)
        if wanted or len(names) == 1:
            return Chosen(tuple(names), tuple(names))
        first = {}
        for name in names[:LOADED_MAX]:
            asked = pb.ResolveModelRequest(model=name)
            first[name] = (await stub.ResolveModel(asked, timeout=CALL_S)).version.digest
        return Chosen(tuple(names), (), first)
    except grpc.aio.AioRpcError as error:
        raise CliError(f"the modelstore at {target}: {from_rpc_error(error).message}") from None
    finally:
        await channel.close(None)


def is_sim(model: pb.Model) -> bool:
    """Whether the model has no weights, so that only the sim engine serves it."""
    return all(version.manifest.model_type == "sim" for version in model.versions)


def choose(
    stored: Mapping[str, bool], engine: str, wanted: Sequence[str], nameless: Collection[str] = ()
) -> list[str]:
    """Names to serve. `stored` says of each model whether it is one without weights; those in `nameless`
    have no default alias, so that their name alone stands for nothing.
    """
    usable = sorted(name for name, sim in stored.items() if engine == "sim" or not sim)
    for model in wanted:
        try:
            name = parse_model(model).name
        except ValueError as error:
            raise CliError(f"--model {model}: {error}") from None
        if name not in stored:
            there = ", ".join(sorted(stored)) or "none"
            raise CliError(
                f"no model named {name!r} in the store (there: {there}): "
                f"import it with `tokenloom models import SRC --name {name}`"
            )
        if name not in usable:
            raise CliError(f"{name} has no weights: serve it with --engine sim")
    if wanted:
        return list(dict.fromkeys(wanted))
    if not usable:
        raise CliError(
            "no model in the store: import one with `tokenloom models import SRC --name NAME`, "
            "or start with --engine sim"
        )
    usable = [name for name in usable if name not in nameless]
    if not usable:
        raise CliError(
            f"no model has an alias {DEFAULT_ALIAS!r}: set one with "
            f"`tokenloom models alias NAME {DEFAULT_ALIAS} VERSION`, or say which to load with --model"
        )
    return usable
