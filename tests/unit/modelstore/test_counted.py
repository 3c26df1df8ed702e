"""How often progress is told."""

from services.modelstore.core.ports import Progress
from services.modelstore.counted import Pace


def test_progress_is_told_ten_times_a_second_and_never_without_its_ends():
    now = [0.0]
    pace = Pace(lambda: now[0])
    told = []
    for stage in ("read", "store"):
        for done in range(101):
            now[0] += 0.01
            if pace.lets(Progress(stage, done, 100)):
                told.append((stage, done))
    assert told[0] == ("read", 0)
    assert ("read", 100) in told
    assert ("store", 0) in told
    assert told[-1] == ("store", 100)
    assert 20 <= len(told) <= 24
