"""Between the core's values and the messages of loom.modelstore.v1; decides nothing."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from loom.modelstore.v1 import modelstore_pb2 as pb

from services.modelstore.core.aliases import AliasState, Target
from services.modelstore.core.catalogue import Catalogue, Model, StoredVersion
from services.modelstore.core.deprecations import Deprecation
from services.modelstore.core.manifest import File
from services.modelstore.core.ports import Progress, StoreError
from services.modelstore.core.refusal import STORE_FULL, Refused
from services.modelstore.core.requests import DEFAULT_DTYPE, ImportRequest, Violations
from services.modelstore.garbage import Collected
from services.modelstore.importer import Imported
from services.modelstore.verify import Damaged, Verified
from tokenloom.kit.errors import CallError, field_invalid

_DATA_TAG = pb.FetchBlobResponse.DATA_FIELD_NUMBER << 3 | 2


def call_error(refusal: Refused) -> CallError:
    """The refusal as it travels."""
    if refusal.reason == "FIELD_INVALID":
        field = refusal.metadata.get("field", "")
        why = refusal.message.removeprefix(f"{field}: ")
        return field_invalid((field, why))
    return CallError(refusal.reason, refusal.message, metadata=refusal.metadata)


def store_unavailable(error: StoreError) -> CallError:
    """The place where the objects are is full or away."""
    message = (
        STORE_FULL if error.errno == errno.ENOSPC else f"the store cannot be used: {error.strerror or error}"
    )
    return CallError("SERVICE_UNAVAILABLE", message, metadata={"service": "modelstore"})


def refuse(violations: Violations) -> None:
    """Raises CallError with FIELD_INVALID when there are any."""
    if violations:
        raise field_invalid(*violations)


def import_request(request: pb.ImportModelRequest) -> ImportRequest:
    return ImportRequest(
        source=request.source,
        name=request.name,
        dtype=request.dtype or DEFAULT_DTYPE,
        aliases=tuple(request.aliases),
        source_digest=request.source_digest,
    )


def targets(found: Iterable[pb.AliasTarget]) -> list[Target]:
    """A weight that is not given is 1."""
    return [Target(target.digest, target.weight or 1) for target in found]


def version(stored: StoredVersion) -> pb.Version:
    manifest, facts = stored.manifest, stored.manifest.facts
    message = pb.Manifest(
        name=manifest.name,
        architecture=facts.architecture,
        model_type=facts.model_type,
        dtype=facts.dtype,
        context_length=facts.context_length,
        vocab_size=facts.vocab_size,
        parameters=facts.parameters,
        weight_bytes=facts.weight_bytes,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        has_chat_template=facts.has_chat_template,
        stop_token_ids=facts.stop_token_ids,
        bos_token_id=facts.bos_token_id,
        license=facts.license,
        files=[_file(file) for file in manifest.files],
        provenance=dict(manifest.provenance),
        checked_with=dict(facts.checked_with),
    )
    # Beside the manifest, not of it: the same model imported elsewhere is the same version.
    if stored.imported.created_unix_ms:
        message.created_at.FromMilliseconds(stored.imported.created_unix_ms)
    if stored.imported.source:
        message.provenance["source"] = stored.imported.source
    return pb.Version(digest=stored.digest, manifest=message, deprecation=_deprecation(stored.deprecation))


def _deprecation(mark: Deprecation | None) -> pb.Deprecation | None:
    if mark is None:
        return None
    message = pb.Deprecation(message=mark.message)
    message.since.FromMilliseconds(mark.since_unix_ms)
    return message


def alias(state: AliasState) -> pb.Alias:
    shares = [pb.AliasTarget(digest=t.digest, weight=t.weight) for t in state.targets]
    message = pb.Alias(name=state.name, targets=shares, sequence=state.sequence)
    if state.changed_unix_ms:
        message.changed_at.FromMilliseconds(state.changed_unix_ms)
    return message


def models(catalogue: Catalogue) -> list[pb.Model]:
    return [_model(model) for model in catalogue.models.values()]


def _model(model: Model) -> pb.Model:
    return pb.Model(
        name=model.name,
        aliases=[alias(state) for state in model.aliases],
        versions=[version(stored) for stored in model.versions],
    )


def import_event(event: Progress | Imported) -> pb.ImportModelResponse:
    if isinstance(event, Progress):
        return pb.ImportModelResponse(progress=_progress(event))
    imported = pb.Imported(version=version(event.version), created=event.created)
    return pb.ImportModelResponse(imported=imported)


def verify_event(event: Progress | Damaged | Verified) -> pb.VerifyResponse:
    if isinstance(event, Progress):
        return pb.VerifyResponse(progress=_progress(event))
    if isinstance(event, Damaged):
        found = pb.Damaged(digest=event.digest, versions=event.versions, problem=event.problem)
        return pb.VerifyResponse(damaged=found)
    verified = pb.Verified(
        versions=event.versions, blobs=event.blobs, bytes=event.bytes, damaged=event.damaged
    )
    return pb.VerifyResponse(verified=verified)


def collected(done: Collected) -> pb.CollectGarbageResponse:
    return pb.CollectGarbageResponse(
        deleted=[_file(file) for file in done.deleted],
        deleted_bytes=sum(file.size_bytes for file in done.deleted),
        kept_blobs=done.kept_blobs,
        kept_bytes=done.kept_bytes,
        spared_blobs=done.spared_blobs,
    )


def _file(file: File) -> pb.File:
    return pb.File(path=file.path, digest=file.digest, size_bytes=file.size_bytes)


def _progress(event: Progress) -> pb.Progress:
    return pb.Progress(stage=event.stage, done_bytes=event.done_bytes, total_bytes=event.total_bytes)


class BlobPiece:
    """A FetchBlobResponse that is written at once: protobuf would copy the bytes of each piece twice."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def SerializeToString(self) -> bytes:
        """The one field as https://protobuf.dev/programming-guides/encoding has it: tag, length, bytes."""
        head, length = bytearray([_DATA_TAG]), len(self.data)
        while length > 0x7F:
            head.append(length & 0x7F | 0x80)
            length >>= 7
        head.append(length)
        return b"".join((head, self.data))
