"""Numbers that depend on seed and position alone."""

import numpy as np

from services.worker.engine.randomness import uniforms


def draw(seeds, positions):
    return uniforms(np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.int64))


def splitmix64(state: int) -> int:
    """The published generator, one step, in plain integers."""
    mask = (1 << 64) - 1
    value = (state + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_it_is_splitmix64_of_a_mixed_seed():
    def finalise(value: int) -> int:
        return splitmix64((value - 0x9E3779B97F4A7C15) % (1 << 64))

    for seed, position in [(0, 0), (1, 0), (2**64 - 1, 77), (123456789, 100_000)]:
        state = (finalise(seed) + position * 0x9E3779B97F4A7C15) % (1 << 64)
        wanted = ((splitmix64(state) >> 12) + 0.5) * 2.0**-52
        assert draw([seed], [position])[0] == wanted


def test_the_rest_of_the_batch_changes_nothing():
    alone = draw([42], [7])[0]
    assert draw([1, 42, 3], [9, 7, 7])[1] == alone


def test_numbers_lie_inside_the_unit_interval_and_fill_it_evenly():
    numbers = draw(np.repeat(np.arange(100), 1000), np.tile(np.arange(1000), 100))
    assert 0.0 < numbers.min() < numbers.max() < 1.0
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    chi_square = ((counts - 2000.0) ** 2 / 2000.0).sum()
    assert chi_square < 85, "49 degrees of freedom: 85 is beyond one in a thousand"


def test_neighbouring_seeds_and_positions_are_uncorrelated():
    seeds = draw(np.arange(5000), np.zeros(5000))
    positions = draw(np.full(5000, 3), np.arange(5000))
    for numbers in (seeds, positions):
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(seeds, positions)[0, 1]) < 0.05
