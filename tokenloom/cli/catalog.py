"""Which models the workers of a local mesh load: those asked for, or those that the store has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.modelstore.v1 import modelstore_pb2_grpc as rpc

from tokenloom.cli.errors import CliError
from tokenloom.contract.models import DEFAULT_ALIAS, parse_model
from tokenloom.kit.channels import open_channel

SIM_SOURCE = "builtin:sim"
SIM_NAME = "sim"
LOADED_MAX = 8
"""Models that one worker loads at its start."""
CALL_S = 30.0


async def models_to_load(target: str, engine: str, wanted: Sequence[str]) -> list[str]:
    """Names for the workers' `models`. Imports the model without weights for `sim` when there is none.

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
            return [SIM_NAME]
        nameless = {m.name for m in listed.models if not any(a.name == DEFAULT_ALIAS for a in m.aliases)}
        return choose(stored, engine, wanted, nameless)
    finally:
        await channel.close(None)


def is_sim(model: pb.Model) -> bool:
    """Whether the model has no weights, so that only the sim engine serves it."""
    return all(version.manifest.model_type == "sim" for version in model.versions)


def choose(
    stored: Mapping[str, bool], engine: str, wanted: Sequence[str], nameless: Collection[str] = ()
) -> list[str]:
    """Names to load. `stored` says of each model whether it is one without weights; those in `nameless`
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
    if len(usable) > LOADED_MAX:
        raise CliError(
            f"the store has {len(usable)} models: say which to load at the start with --model "
            f"(at most {LOADED_MAX}); the others are loaded when they are asked for"
        )
    return usable
