"""What a model string means in a catalogue."""

import pytest

from services.modelstore.core.aliases import AliasState, Target
from services.modelstore.core.catalogue import Catalogue, StoredVersion
from services.modelstore.core.manifest import ImportRecord
from services.modelstore.core.refusal import Refused
from tests.unit.modelstore.made import manifest


def stored(name, content, created=0):
    made = manifest(name, content)
    return StoredVersion(made.digest, made, ImportRecord(created, "x"))


OLD, NEW, OTHER = stored("m", b"old", 1), stored("m", b"new", 2), stored("n", b"other", 3)


def catalogue(**aliases):
    states = {("m", name): AliasState(name, 1, tuple(targets)) for name, targets in aliases.items()}
    return Catalogue([OLD, NEW, OTHER], states)


def refusal(text, found):
    with pytest.raises(Refused) as caught:
        found.resolve(text)
    return caught.value


def test_a_bare_name_is_the_alias_stable():
    assert catalogue(stable=[Target(OLD.digest)]).resolve("m") is OLD


def test_a_named_alias_is_followed():
    assert catalogue(stable=[Target(OLD.digest)], canary=[Target(NEW.digest)]).resolve("m@canary") is NEW


def test_a_digest_names_a_version_whatever_the_aliases_say():
    assert catalogue().resolve(f"m@{NEW.digest}") is NEW
    assert catalogue().resolve(f"m@{NEW.digest[:19]}") is NEW


def test_an_alias_with_shares_resolves_to_the_greatest():
    shares = [Target(OLD.digest, 1), Target(NEW.digest, 99)]
    assert catalogue(stable=shares).resolve("m") is NEW


def test_a_digest_of_another_model_is_not_found():
    assert refusal(f"m@{OTHER.digest}", catalogue()).reason == "MODEL_NOT_FOUND"


def test_an_unknown_name_lists_what_is_there():
    error = refusal("nope", catalogue())
    assert (error.reason, error.metadata) == ("MODEL_NOT_FOUND", {"model": "nope"})
    assert "known: m, n" in error.message


def test_a_name_without_the_alias_lists_its_aliases():
    error = refusal("m", catalogue(canary=[Target(NEW.digest)]))
    assert error.message == "no model 'm@stable'; aliases of m: canary"


@pytest.mark.parametrize("text", ["", "a b", "m@", "m@sha256:123", "m@sha256:XYZ", "-m", "x" * 97])
def test_a_string_that_is_no_model_string_names_the_field(text):
    error = refusal(text, catalogue())
    assert error.reason == "FIELD_INVALID"
    assert error.message.startswith("model: ")


def test_an_ambiguous_digest_asks_for_more_digits():
    # Two versions whose digests begin alike, which real hashing will not give a test.
    twins = [StoredVersion(f"sha256:{'c' * 60}{end}", OLD.manifest, OLD.imported) for end in ("0000", "1111")]
    error = refusal("m@sha256:" + "c" * 12, Catalogue(twins, {}))
    assert error.reason == "FIELD_INVALID"
    assert "more digits" in error.message


def test_an_alias_to_a_version_that_is_gone_is_not_found():
    assert refusal("m", catalogue(stable=[Target("sha256:" + "0" * 64)])).reason == "MODEL_NOT_FOUND"


def test_versions_come_newest_first_and_aliases_by_name():
    model = catalogue(stable=[Target(OLD.digest)], canary=[Target(NEW.digest)]).models["m"]
    assert model.versions == (NEW, OLD)
    assert [alias.name for alias in model.aliases] == ["canary", "stable"]


def test_a_version_knows_who_uses_it():
    found = catalogue(stable=[Target(OLD.digest)], canary=[Target(OLD.digest), Target(NEW.digest)])
    assert found.used_by(OLD.digest) == ["m@canary", "m@stable"]
    assert found.used_by(OTHER.digest) == []


def test_aliases_of_a_model_without_versions_are_not_shown():
    gone = {("gone", "stable"): AliasState("stable", 1, (Target(OLD.digest),))}
    assert list(Catalogue([OLD], gone).models) == ["m"]


def test_an_alias_that_was_taken_away_is_not_shown_and_names_nothing():
    found = catalogue(stable=[], canary=[Target(NEW.digest)])
    assert [alias.name for alias in found.models["m"].aliases] == ["canary"]
    assert refusal("m", found).message == "no model 'm@stable'; aliases of m: canary"


def test_the_catalogue_knows_the_size_of_every_blob():
    assert catalogue().blob_sizes[OLD.manifest.files[0].digest] == len(b"old")
