"""A growing blob and its journal, killed at any moment."""

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.adapters.blobfile import Blob
from services.worker.adapters.cache_part import PartFile
from tests.unit.worker_cache.fakes import data_of, digest_of

DATA = data_of(5000)


@pytest.fixture
def blob(tmp_path):
    return Blob(tmp_path / "blob")


def opened(blob):
    part = PartFile(blob, len(DATA))
    part.open()
    return part


def fill(part, start, end):
    part.write(start, memoryview(DATA)[start:end])


def test_ranges_in_any_order_become_the_file(blob):
    part = opened(blob)
    pieces = [(start, min(start + 700, len(DATA))) for start in range(0, len(DATA), 700)]
    random.Random(1).shuffle(pieces)
    for start, end in pieces:
        fill(part, start, end)
        part.hash_to(part.front)
    assert part.digest() == digest_of(DATA)
    part.finish()
    part.close()
    assert blob.path.read_bytes() == DATA
    assert [path.name for path in blob.path.parent.iterdir()] == ["blob"]


def test_what_was_written_is_still_known_after_a_kill(blob):
    killed = opened(blob)
    fill(killed, 0, 1000)
    fill(killed, 3000, 4000)
    part = opened(blob)
    assert part.total == 2000
    assert part.front == 1000
    assert part.gaps(10_000) == [(1000, 3000), (4000, 5000)]
    killed.close()
    part.close()


def test_a_journal_whose_file_is_gone_counts_for_nothing(blob):
    blob.ranges.write_text("\n0 5000")
    part = opened(blob)
    assert part.total == 0
    fill(part, 0, 10)
    part.close()
    assert blob.ranges.read_text() == "\n0 10"


def test_a_journal_that_promises_more_than_the_file_has_is_cut(blob):
    blob.part.write_bytes(DATA[:1500])
    blob.ranges.write_text("\n0 1000\n1000 2000\n4000 5000")
    part = opened(blob)
    assert part.total == 1500
    part.close()


@given(st.binary(max_size=200))
def test_a_journal_of_any_bytes_never_names_bytes_outside_of_the_file(tmp_path_factory, journal):
    blob = Blob(tmp_path_factory.mktemp("part") / "blob")
    blob.part.write_bytes(DATA[:3000])
    blob.ranges.write_bytes(journal)
    part = opened(blob)
    assert all(0 <= start < end <= len(DATA) for start, end in part.gaps(100_000))
    assert part.total <= 3000
    part.close()


@given(st.lists(st.integers(0, 49), unique=True, min_size=1), st.integers(0, 1000))
def test_a_journal_cut_anywhere_names_only_bytes_that_were_written(tmp_path_factory, pieces, cut):
    """As a full disk leaves it: a line may end in the middle, and others follow."""
    blob = Blob(tmp_path_factory.mktemp("part") / "blob")
    part = opened(blob)
    for piece in pieces:
        fill(part, 100 * piece, 100 * piece + 100)
    part.close()
    journal = blob.ranges.read_bytes()
    blob.ranges.write_bytes(journal[: min(cut, len(journal))])
    part = opened(blob)
    fill(part, 0, 100)
    part.close()
    part = opened(blob)
    written = {byte for piece in [0, *pieces] for byte in range(100 * piece, 100 * piece + 100)}
    missing = {byte for start, end in part.gaps(100_000) for byte in range(start, end)}
    assert missing >= set(range(len(DATA))) - written
    assert not missing & set(range(100))
    part.close()


def test_a_write_that_fails_is_not_noted(blob, monkeypatch):
    part = opened(blob)
    fill(part, 0, 100)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="no space"):
        fill(part, 100, 200)
    part.close()
    again = opened(blob)
    assert again.gaps(100_000) == [(100, 5000)]
    again.close()


def test_the_digest_is_of_what_is_in_the_file_not_of_what_came(blob):
    part = opened(blob)
    fill(part, 0, len(DATA))
    with blob.part.open("r+b") as file:
        file.write(b"spoilt by the disk")
    part.hash_to(part.front)
    assert part.digest() != digest_of(DATA)
    part.close()
