"""Names to versions."""

import pytest

from services.gateway.core.canaries import Target
from services.gateway.core.catalogue import Catalogue, ModelEntry
from services.gateway.core.refusal import Refusal
from tests.unit.gateway.made import version
from tokenloom.contract.models import parse_model

A, B = "sha256:" + "a" * 64, "sha256:" + "a" * 20 + "b" * 44


def catalogue():
    versions = {A: version("tiny", digest=A), B: version("tiny", digest=B)}
    aliases = {
        "stable": [Target(A, 1)],
        "canary": [Target(A, 1), Target(B, 3)],
        "half": [Target("x", 9), Target(A, 2), Target(B, 2)],
        "gone": [Target("x", 1)],
    }
    return Catalogue({"tiny": ModelEntry("tiny", aliases, versions), "bare": ModelEntry("bare")})


def candidates(text):
    return catalogue().candidates(parse_model(text))


def resolve(text):
    return candidates(text).main


def refusal(text):
    with pytest.raises(Refusal) as refused:
        resolve(text)
    return refused.value


def test_a_bare_name_is_its_stable_alias():
    assert resolve("tiny").digest == A


def test_a_digest_may_be_cut_as_long_as_it_names_one_version():
    assert resolve("tiny@" + B[:40]).digest == B
    assert "means 2 versions: give more digits" in refusal("tiny@" + A[:20]).message


def test_an_alias_leaves_its_targets_to_choose_from_and_a_digest_one():
    found = candidates("tiny@canary")
    assert (found.alias, found.targets) == ("tiny@canary", (Target(A, 1), Target(B, 3)))
    assert found.version(found.targets[1]).digest == B
    assert candidates("tiny").alias == "tiny@stable"
    assert candidates("tiny@" + B).targets == (Target(B, 1),)


def test_a_target_whose_version_is_not_here_has_no_share():
    assert candidates("tiny@half").targets == (Target(A, 2), Target(B, 2))


def test_an_alias_mainly_stands_for_its_largest_share_or_the_first_of_equal_ones():
    assert resolve("tiny@canary").digest == B
    assert resolve("tiny@half").digest == A


def test_an_unknown_name_is_answered_with_the_known_ones():
    error = refusal("tinny")
    assert error.reason == "MODEL_NOT_FOUND"
    assert "known models: tiny, tiny@canary, tiny@half" in error.message


@pytest.mark.parametrize("asked", ["tiny@beta", "tiny@gone", "bare", "tiny@sha256:" + "c" * 64])
def test_what_names_no_version_is_not_found(asked):
    assert refusal(asked).reason == "MODEL_NOT_FOUND"


def test_an_unknown_alias_is_answered_with_the_models_aliases():
    assert "aliases of tiny: canary, gone, half, stable" in refusal("tiny@beta").message


def test_names_leave_out_what_cannot_be_used():
    assert catalogue().names() == ["tiny", "tiny@canary", "tiny@half"]


def test_the_representative_is_the_stable_version_or_else_the_first_alias():
    entry = catalogue().models["tiny"]
    assert entry.representative().digest == A
    assert ModelEntry("x", {"canary": [Target(B, 1)]}, entry.versions).representative().digest == B
    assert catalogue().models["bare"].representative() is None


def test_a_long_list_of_models_is_cut_in_messages():
    many = {f"m{i}": ModelEntry(f"m{i}", {"stable": [Target(A, 1)]}, {A: version()}) for i in range(30)}
    with pytest.raises(Refusal, match="and 10 more"):
        Catalogue(many).candidates(parse_model("other"))
