"""Which sizes are captured, which graph a batch gets, and where its arrays lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.cuda.graphs import Graph, sizes, table
from services.worker.engine.cuda.inputs import ALIGNMENT_BYTES, Inputs


@given(st.integers(1, 2000))
def test_the_largest_size_is_the_largest_batch_and_sizes_rise(most):
    found = sizes(most)
    assert found[-1] == most
    assert found == sorted(set(found))


@given(st.integers(1, 2000), st.data())
def test_every_batch_gets_the_smallest_graph_that_holds_it(most, data):
    known = {rows: Graph(rows, torch.empty(0), lambda: None) for rows in sizes(most)}
    batch = data.draw(st.integers(1, most))
    graph = table(known)[batch]
    assert graph is not None
    assert graph.rows == min(rows for rows in known if rows >= batch)


@given(st.integers(17, 2000))
def test_padding_stays_small(batch):
    assert min(rows for rows in sizes(2048) if rows >= batch) - batch < max(8, batch / 4)


ARRAYS = {
    "ids": np.arange(5, dtype=np.int64),
    "lengths": np.arange(3, dtype=np.int32),
    "tables": np.arange(12, dtype=np.int32).reshape(3, 4)[:, :3],
    "none": np.zeros((0, 4), dtype=np.int32),
}


def test_arrays_arrive_as_they_were_sent_whatever_was_sent_before():
    inputs = Inputs(4096, torch.device("cpu"))
    for turn in range(5):
        sent = {name: array + turn for name, array in ARRAYS.items()}
        there = inputs.send(sent)
        for name, array in sent.items():
            assert torch.equal(there[name], torch.from_numpy(array.copy()))


def test_the_places_of_arrays_depend_on_their_shapes_alone():
    inputs = Inputs(4096, torch.device("cpu"))
    there = inputs.send(ARRAYS)
    again = inputs.where({name: np.empty_like(array) for name, array in ARRAYS.items()})
    assert [part.data_ptr() for part in there.values()] == [part.data_ptr() for part in again.values()]
    assert all(part.data_ptr() % 8 == 0 for part in there.values())


def test_arrays_beyond_the_bound_are_refused():
    with pytest.raises(ValueError, match="4096"):
        Inputs(ALIGNMENT_BYTES, torch.device("cpu")).send({"ids": np.zeros(512, dtype=np.int64)})
