"""Which bytes are here, compared with a plain set of them."""

from hypothesis import given
from hypothesis import strategies as st

from services.worker.adapters.cache_ranges import Ranges

SIZE = 40
spans = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)))


@given(spans)
def test_ranges_hold_exactly_the_bytes_that_were_added(added):
    ranges, here = Ranges(added), set()
    for start, end in added:
        here |= set(range(start, end))
    assert {byte for start, end in ranges for byte in range(start, end)} == here
    assert ranges.total == len(here)
    assert ranges.front == next(byte for byte in range(SIZE + 1) if byte not in here)
    flat = [edge for span in ranges for edge in span]
    assert flat == sorted(set(flat)), "ranges that touch are one"


@given(spans, st.integers(0, SIZE), st.integers(1, SIZE))
def test_gaps_and_ranges_together_are_the_whole_file(added, size, span_max):
    ranges = Ranges(added)
    gaps = list(ranges.gaps(size, span_max))
    missing = [byte for start, end in gaps for byte in range(start, end)]
    here = {byte for start, end in ranges for byte in range(start, end)}
    assert missing == [byte for byte in range(size) if byte not in here], "in order, each once"
    assert all(0 < end - start <= span_max for start, end in gaps)
