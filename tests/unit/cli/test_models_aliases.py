"""`tokenloom models alias | promote | rollback | deprecate` against a store in memory."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loom.modelstore.v1 import modelstore_pb2 as pb

from tests.unit.cli.fakemesh import A, B, C, FakeStore, mesh, version
from tokenloom.cli.errors import CliError
from tokenloom.cli.models_changes import before_last, parse_share, same


@pytest.fixture
def store(mesh_home):
    made = FakeStore(version(A), version(B), version(C))
    made.set("chat", "stable", a=1)
    with mesh(made):
        yield made


def test_an_alias_is_pointed_at_one_version_by_the_digits_that_the_list_shows(models, store):
    ended = models("alias", "chat", "canary", "b" * 12)
    assert (ended.status, ended.out) == (0, "chat@canary is sha256:bbbbbbbbbbbb (change 1)\n")
    assert store.now("chat", "canary") == {B: 1}


def test_traffic_is_shared_by_weight_between_digests_and_other_aliases(models, store):
    store.set("chat", "canary", b=1)
    ended = models("alias", "chat", "stable", f"{'a' * 12}=90", "canary=10")
    assert ended.out == "chat@stable is sha256:aaaaaaaaaaaa 90%, sha256:bbbbbbbbbbbb 10% (change 2)\n"
    assert store.now("chat", "stable") == {A: 90, B: 10}


def test_shares_of_the_same_version_are_added_up(models, store):
    assert models("alias", "chat", "both", "stable=3", f"{'a' * 12}=2").status == 0
    assert store.now("chat", "both") == {A: 5}


@pytest.mark.parametrize("share", ["stable=0", "stable=", "stable=-1", "=5", "stable=1.5", "stable=1000001"])
def test_a_share_that_is_no_weight_is_a_usage_error_that_changes_nothing(models, store, share):
    ended = models("alias", "chat", "stable", share)
    assert ended.status == 2
    assert share in ended.err
    assert len(store.changes["chat", "stable"]) == 1


@given(st.text(st.characters(exclude_characters="="), min_size=1), st.integers(1, 1_000_000))
def test_a_share_is_read_back_as_it_was_written(name, weight):
    assert parse_share(f"{name}={weight}") == (name, weight)
    assert parse_share(name) == (name, 1)


def test_a_change_that_expects_another_number_is_refused_by_the_store(models, store):
    ended = models("alias", "chat", "stable", "b" * 12, "--expect", "0")
    assert (ended.status, "ALIAS_CONFLICT" in ended.err) == (1, True)
    assert store.now("chat", "stable") == {A: 1}


def test_an_alias_is_deleted_and_its_history_stays(models, store):
    assert models("alias", "chat", "stable", "--delete").out == "chat@stable is deleted; its history stays\n"
    assert models("alias", "chat", "stable", "--delete", "--json", "--expect", "1").status == 1
    listed = json.loads(models("alias", "chat", "stable", "--history", "--json").out)
    assert [(change["sequence"], len(change["targets"]), change["current"]) for change in listed] == [
        (2, 0, False),
        (1, 1, False),
    ]
    assert "deleted" in models("alias", "chat", "stable").out


def test_the_history_of_every_alias_is_listed_newest_first(models, store):
    store.set("chat", "stable", a=9, b=1)
    store.set("chat", "canary", b=1)
    lines = models("alias", "chat").out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ALIAS", "CHANGE"],
        ["canary", "1"],
        ["stable", "2"],
        ["stable", "1"],
    ]
    assert "sha256:aaaaaaaaaaaa 90%, sha256:bbbbbbbbbbbb 10% (now)" in lines[2]
    assert "(now)" not in lines[3]
    plain = json.loads(models("alias", "chat", "stable", "--limit", "1", "--json").out)
    assert plain == [
        {
            "model": "chat",
            "alias": "stable",
            "sequence": 2,
            "targets": [{"digest": A, "weight": 9}, {"digest": B, "weight": 1}],
            "changed_at": "2023-11-14T22:13:20Z",
            "current": True,
        }
    ]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("alias", "chat", "--delete"), 2, "say which alias"),
        (("alias", "chat", "stable", "canary", "--delete"), 2, "one of them"),
        (("alias", "chat", "stable", "--delete", "--history"), 2, "one of them"),
        (("alias", "chat", "stable", "--expect", "1"), 2, "--expect goes with"),
        (("alias", "none"), 1, "no model named 'none' (there: chat)"),
        (("alias", "chat", "nope"), 1, "never had an alias 'nope' (there: stable)"),
        (("alias", "chat", "stable", "nope"), 1, "MODEL_NOT_FOUND"),
        (("promote", "chat"), 1, "chat has no alias 'canary' (there: stable)"),
        (("promote", "chat", "--from", "stable"), 2, "both 'stable'"),
        (("promote", "none"), 1, "no model named 'none'"),
        (("rollback", "chat"), 1, "stood for something else at no earlier change"),
        (("rollback", "chat", "--to-change", "7"), 1, "rolled back to change 7"),
        (("rollback", "chat", "nope"), 1, "never had an alias 'nope'"),
        (("deprecate", "chat"), 2, "give a MESSAGE"),
        (("deprecate", "chat", "old", "--undo"), 2, "give a MESSAGE"),
        (("deprecate", "chat@dddddddddddd", "old"), 1, "MODEL_NOT_FOUND"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_changes_nothing(models, store, words, status, says):
    ended = models(*words)
    assert (ended.status, ended.out) == (status, "")
    assert says in ended.err
    assert store.requests == []


def test_promotion_points_stable_at_the_canary_and_compares(models, store):
    store.set("chat", "canary", b=7)
    ended = models("promote", "chat")
    assert ended.out == "chat@stable is sha256:bbbbbbbbbbbb, was sha256:aaaaaaaaaaaa (change 2)\n"
    assert store.now("chat", "stable") == {B: 1}
    (request,) = store.requests
    assert request.expected_sequence == 1
    again = json.loads(models("promote", "chat", "--json").out)
    assert (again["changed"], again["sequence"], again["previous"]) == (False, 2, again["targets"])
    assert "nothing changed" in models("promote", "chat").out
    assert len(store.requests) == 1


def test_promotion_makes_an_alias_that_was_never_there_and_only_then(models, store):
    ended = models("promote", "chat", "--from", "stable", "--to", "frozen")
    assert ended.out == "chat@frozen is sha256:aaaaaaaaaaaa, it is new (change 1)\n"
    assert store.requests[0].HasField("expected_sequence")
    assert store.requests[0].expected_sequence == 0


def test_a_canary_of_several_versions_is_not_promoted(models, store):
    store.set("chat", "canary", a=1, b=3)
    ended = models("promote", "chat")
    assert ended.status == 1
    assert "chat@canary is several versions (sha256:aaaaaaaaaaaa 25%, sha256:bbbbbbbbbbbb 75%)" in ended.err
    assert "tokenloom models alias chat stable VERSION" in ended.err


def test_a_rollback_undoes_the_last_change_and_a_second_one_undoes_the_rollback(models, store):
    store.set("chat", "stable", a=90, b=10)
    store.set("chat", "stable", b=1)
    ended = models("rollback", "chat")
    shares = "sha256:aaaaaaaaaaaa 90%, sha256:bbbbbbbbbbbb 10%"
    assert ended.out == f"chat@stable is {shares}, was sha256:bbbbbbbbbbbb (change 4)\n"
    assert store.requests[0].expected_sequence == 3
    back = json.loads(models("rollback", "chat", "--json").out)
    assert (back["targets"], back["changed"], back["sequence"]) == ([{"digest": B, "weight": 1}], True, 5)


def test_a_rollback_to_a_change_takes_that_one(models, store):
    store.set("chat", "stable", b=1)
    store.set("chat", "stable", c=1)
    assert (
        "is sha256:aaaaaaaaaaaa, was sha256:cccccccccccc" in models("rollback", "chat", "--to-change", 1).out
    )
    assert "nothing changed" in models("rollback", "chat", "stable", "--to-change", 1).out


def test_a_deleted_alias_is_rolled_back_to_what_it_was(models, store):
    store._record("chat", "stable", [])
    ended = models("rollback", "chat")
    assert ended.out == "chat@stable is sha256:aaaaaaaaaaaa, was deleted (change 3)\n"


def change(sequence, **weights):
    targets = [pb.AliasTarget(digest=digest, weight=weight) for digest, weight in weights.items()]
    return pb.Alias(name="stable", sequence=sequence, targets=targets)


STATES = st.dictionaries(st.sampled_from("abc"), st.integers(1, 3), max_size=2)


@given(st.lists(STATES, min_size=1, max_size=8))
def test_what_is_rolled_back_to_is_the_newest_earlier_state_that_differs(states):
    changes = [change(i + 1, **weights) for i, weights in enumerate(states)][::-1]
    found = before_last(changes)
    passed = changes[1:] if found is None else changes[1 : changes.index(found)]
    assert all(not c.targets or same(c.targets, changes[0].targets) for c in passed)
    if found is not None:
        assert found.targets
        assert not same(found.targets, changes[0].targets)


def test_the_same_division_in_other_numbers_is_no_change():
    assert same(change(1, a=1, b=1).targets, change(2, b=5, a=5).targets)
    assert not same(change(1, a=1, b=1).targets, change(2, a=1, b=2).targets)


def test_a_version_is_deprecated_and_no_longer_so(models, store):
    ended = models("deprecate", "chat@stable", "use chat 2 [soon]")
    assert ended.out == "chat@sha256:aaaaaaaaaaaa is deprecated: use chat 2 [soon]\n"
    assert "deprecated: use chat 2 [soon]" in models("list").out
    assert "use chat 2 [soon] (since 2023-11-1" in models("show", "chat").out
    shown = json.loads(models("show", "chat", "--json").out)
    assert shown["deprecation"] == {"message": "use chat 2 [soon]", "since": "2023-11-14T22:13:20Z"}
    assert "is no longer deprecated" in models("deprecate", "chat", "--undo").out
    assert json.loads(models("show", "chat", "--json").out)["deprecation"] is None


def test_a_model_without_aliases_says_how_to_set_one(models, mesh_home):
    with mesh(FakeStore(version(A))):
        assert "tokenloom models alias chat ALIAS VERSION" in models("alias", "chat").out
        assert json.loads(models("alias", "chat", "--json").out) == []


def test_a_bad_share_raises_what_ends_the_command():
    with pytest.raises(CliError) as caught:
        parse_share("a=b")
    assert caught.value.status == 2
