"""`tokenloom simulate`, from its options to its files."""

import json

import pytest
from jsonschema import validate
from typer.testing import CliRunner

from services.batcher.simulate.policies import POLICIES
from tests.unit.batcher_simulate.made import trace_file
from tokenloom.cli import simulate
from tokenloom.cli.errors import CliError
from tokenloom.cli.main import app

SHARE = {"type": "number", "minimum": 0, "maximum": 1}
PERCENTILES = {
    "type": "object",
    "required": ["p50", "p90", "p99"],
    "additionalProperties": {"type": "number"},
}
RATE_KEYS = {"^[0-9]+\\.[0-9]+$": {}}
RESULT = {
    "type": "object",
    "required": [
        "policy", "rate", "requests", "out_of_reach", "good", "good_share", "goodput", "ttft_ms", "itl_ms",
        "hit_rate", "jain_load", "refusals", "unfinished", "series", "wall_s",
    ],
    "properties": {"good_share": SHARE, "hit_rate": SHARE, "jain_load": SHARE,
                   "ttft_ms": PERCENTILES, "itl_ms": PERCENTILES},
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "required": ["policies", "bound", "trace", "workers", "profile", "seed", "slo"],
    "properties": {
        "policies": {
            "additionalProperties": {
                "required": ["r90", "rates"],
                "properties": {
                    "r90": {"type": ["number", "null"]},
                    "rates": {
                        "patternProperties": {"^[0-9]+\\.[0-9]+$": RESULT},
                        "additionalProperties": False,
                    },
                },
            }
        },
        "bound": {
            "required": ["r90", "rates"],
            "properties": {"rates": {"additionalProperties": {"properties": {"good_share": SHARE}}}},
        },
    },
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return trace_file(tmp_path_factory.mktemp("trace") / "small.jsonl")


def call(*arguments):
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


@pytest.fixture(scope="module")
def written(trace, tmp_path_factory):
    """All policies at two rates, with every file."""
    folder = tmp_path_factory.mktemp("out")
    files = ("--json", folder / "out.json", "--plot", folder / "out.png", "--table", folder / "out.md")
    result = call("--trace", trace, "--workers", 2, "--rate-scale", "2,8", "--policy", "all", *files)
    assert result.exit_code == 0, result.output
    return result.output, folder


def test_the_json_keeps_its_shape(written):
    made = json.loads((written[1] / "out.json").read_text())
    validate(made, SCHEMA)
    assert set(made["policies"]) == set(POLICIES)
    for policy in made["policies"].values():
        assert list(policy["rates"]) == ["2.0", "8.0"]
        assert policy["rates"]["2.0"]["requests"] == 50
    assert list(made["bound"]["rates"]) == ["2.0", "8.0"]


def test_the_table_names_every_policy_and_the_bound(written):
    output, folder = written
    page = (folder / "out.md").read_text()
    for name in (*POLICIES, "(bound)"):
        assert f" {name} " in output
        assert page.count(f"| {name} |") == 3, "the shares, and two rates"


def test_the_picture_is_one(written):
    assert (written[1] / "out.png").read_bytes().startswith(b"\x89PNG")


def test_r90_is_searched_for(trace, tmp_path):
    path = tmp_path / "r90.json"
    result = call("--trace", trace, "--workers", 1, "--policy", "round_robin", "--search-r90", "--json", path)
    assert result.exit_code == 0, result.output
    made = json.loads(path.read_text())
    policy = made["policies"]["round_robin"]
    assert 0 < policy["r90"] <= made["bound"]["r90"]
    assert policy["rates"][str(policy["r90"])]["good_share"] >= 0.9
    assert "R90" in result.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--rate-scale", "2", "--policy", "best"), "'best' is none of"),
        (("--rate-scale", "two"), "no list of numbers"),
        (("--rate-scale", "0"), "above 0"),
        ((), "--rate-scale, --search-r90 or both"),
        (("--rate-scale", "2", "--profile", "h900"), "no profile 'h900'"),
    ],
)
def test_wrong_options_are_named(trace, arguments, complaint):
    result = call("--trace", trace, *arguments)
    assert isinstance(result.exception, CliError)
    assert complaint in str(result.exception)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no request"),
        ('{"timestamp": 0}', "line 1"),
        ('{"timestamp": 0, "input_length": 999999, "output_length": 1}', "never fits"),
    ],
)
def test_a_trace_that_cannot_be_run_is_named(tmp_path, content, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    result = call("--trace", path, "--rate-scale", "1")
    assert complaint in str(result.exception)
    assert "bad.jsonl" in str(result.exception)


def test_a_missing_trace_is_named(tmp_path):
    assert "none.jsonl" in str(call("--trace", tmp_path / "none.jsonl", "--rate-scale", "1").exception)


def test_policies_are_named_once():
    assert simulate.policies_of("random, gaie,random") == ("random", "gaie")
