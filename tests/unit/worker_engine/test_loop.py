"""What the engine's process sends."""

from services.worker.engine.loop import with_outputs
from services.worker.protocol import Load, Output, Step, decode_event, encode

LOAD = Load(0, 0, 0, 0, 0, 0.0, 0.0)


def test_a_step_that_also_tells_of_refused_sequences_loses_nothing_else() -> None:
    step = Step([Output("b", [1], 0)], LOAD, 5, 6, [1 << 63], [2])
    more = with_outputs([Output("a", [], 0, finish="error")], step)
    assert [output.id for output in more.outputs] == ["a", "b"]
    assert more.outputs[1:] == step.outputs
    assert (more.load, more.step_ns, more.step_tokens) == (LOAD, 5, 6)
    assert (more.prefixes_stored, more.prefixes_evicted) == ([1 << 63], [2])
    assert decode_event(encode(more)[4:]) == more
    assert with_outputs([], step) is step


def test_a_step_without_changes_of_the_prefix_cache_says_nothing_of_it() -> None:
    assert b"prefixes" not in encode(Step([], LOAD, 5, 6))
    assert decode_event(encode(Step([], LOAD))[4:]) == Step([], LOAD)
