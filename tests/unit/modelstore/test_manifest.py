"""A version's digest depends on the model and on nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.modelstore.core.manifest import (
    Facts,
    File,
    ImportRecord,
    ManifestError,
    blob_path,
    canonical,
    digest_in_path,
    digest_of,
    make_manifest,
    manifest_path,
    parse_manifest,
)
from tests.unit.modelstore.made import facts, manifest

DIGEST = "sha256:" + "0" * 64


def test_the_digest_is_that_of_the_stored_bytes():
    made = manifest()
    assert made.digest == digest_of(made.to_bytes())
    assert parse_manifest(made.to_bytes(), made.digest) == made


def test_equal_models_have_equal_digests_whatever_order_their_files_came_in():
    files = [File("b", DIGEST, 1), File("a", DIGEST, 2)]
    one, other = (make_manifest("m", facts(), order) for order in (files, files[::-1]))
    assert one.digest == other.digest


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"stop_token_ids": (2,)}, {"bos_token_id": None}])
def test_every_fact_is_part_of_the_digest(change):
    assert manifest(**change).digest != manifest().digest


def test_name_and_content_are_part_of_the_digest():
    assert len({manifest().digest, manifest("other").digest, manifest(content=b"[]").digest}) == 3


def test_the_digest_of_a_known_manifest_never_changes():
    # A changed spelling would give every model in every store a new version.
    assert manifest().digest == "sha256:a66249ba01d0b6782e1b5a181690d9e5a0ddc66d1625639b6465c654fe9fa2c3"


def test_a_manifest_says_nothing_about_time_or_place():
    keys = set(json.loads(manifest().to_bytes()))
    assert keys == {"schema", "name", "files", "provenance", *facts().to_json()}
    assert not any("time" in key or "created" in key for key in keys)


def test_canonical_json_has_one_spelling():
    assert canonical({"b": [1, 2], "a": "é"}) == '{"a":"é","b":[1,2]}'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(float("nan"))


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans(), max_size=8))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value):
    assert canonical(value) == canonical(dict(reversed(value.items())))


@pytest.mark.parametrize("path", ["../x", "/x", "a/../b", "a//b", "./a", "", "a\\b"])
def test_a_file_cannot_leave_its_versions_folder(path):
    with pytest.raises(ValueError, match="leaves the version's folder"):
        make_manifest("m", facts(), [File(path, DIGEST, 1)])


def test_bytes_under_a_wrong_name_are_no_manifest():
    with pytest.raises(ManifestError, match="holds bytes with digest"):
        parse_manifest(manifest().to_bytes(), DIGEST)


@pytest.mark.parametrize("data", [b"{}", b"[]", b"nonsense", b'{"schema":2}', b'{"schema":1,"name":"x"}'])
def test_bytes_that_are_no_manifest_are_refused(data):
    with pytest.raises(ManifestError):
        parse_manifest(data, digest_of(data))


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../etc/passwd", "0" * 64, "sha256:" + "A" * 64])
def test_paths_are_made_of_whole_digests_only(digest):
    with pytest.raises(ValueError, match="is no digest"):
        blob_path(digest)


def test_a_manifests_path_names_its_digest():
    assert digest_in_path(manifest_path(DIGEST)) == DIGEST
    assert digest_in_path(manifest_path(DIGEST) + "#1") is None
    assert digest_in_path(blob_path(DIGEST)) is None


def test_facts_survive_json():
    assert Facts.from_json(json.loads(json.dumps(facts().to_json()))) == facts()


@pytest.mark.parametrize("data", [None, b"", b"nonsense", b"[]", b'{"created_unix_ms": "x"}'])
def test_an_unreadable_record_of_an_import_counts_as_unknown(data):
    assert ImportRecord.from_bytes(data) == ImportRecord(0, "")


def test_a_record_of_an_import_survives_storing():
    record = ImportRecord(123, "model.gguf")
    assert ImportRecord.from_bytes(record.to_bytes()) == record
