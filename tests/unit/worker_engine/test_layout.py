"""How chunks become a flat batch."""

from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.scheduler import Chunk, Plan
from services.worker.core.sequence import Sequence
from services.worker.engine.layout import PADDING_BLOCKS_MAX, BlockTables, flatten, group_lengths


def sequence(name: str, tokens: list[int], blocks: list[int]) -> Sequence:
    one = Sequence(name, tokens, len(tokens), 9)
    one.blocks = blocks
    return one


def test_a_step_is_laid_out_decodes_first_and_longest_first():
    short = sequence("short", [1, 2, 3], [7])
    long = sequence("long", [4, 5, 6, 7, 8, 9], [2, 5])
    prompt = sequence("prompt", [20, 21, 22, 23, 24, 25], [1, 0])
    plan = Plan([Chunk(short, 2, 1), Chunk(long, 5, 1), Chunk(prompt, 3, 2)], 2, 4)
    flat = flatten(plan, BlockTables(4, 8), 4)
    assert flat.ids.tolist() == [9, 3, 23, 24]
    assert flat.positions.tolist() == [5, 2, 3, 4]
    assert flat.slots.tolist() == [5 * 4 + 1, 7 * 4 + 2, 1 * 4 + 3, 0 * 4 + 0]
    assert [span.rows for span in flat.spans] == [slice(0, 2), slice(2, 4)]
    assert flat.spans[0].table.tolist() == [[2, 5], [7, 0]]
    assert not flat.spans[1].fresh


def test_the_rows_that_draw_come_in_the_order_of_the_plan():
    short, long = sequence("short", [1, 2, 3], [7]), sequence("long", [4] * 6, [2, 5])
    whole, cut = sequence("whole", [8, 8], [9]), sequence("cut", [8, 8, 8], [10])
    plan = Plan([Chunk(short, 2, 1), Chunk(long, 5, 1), Chunk(cut, 0, 2), Chunk(whole, 0, 2)], 2, 6)
    flat = flatten(plan, BlockTables(4, 8), 4)
    assert flat.sequences == [short, long, whole]
    assert flat.drawing.tolist() == [1, 0, 5]
    assert flat.spans[-1].fresh


def test_tables_follow_growth_preemption_and_departure():
    tables = BlockTables(2, 4)
    one, two = sequence("one", [1], [3]), sequence("two", [1], [4, 5])
    rows = tables.rows([one, two])
    assert tables.table[rows[0], :1].tolist() == [3]
    one.blocks.append(6)
    assert tables.table[tables.rows([one, two])[0], :2].tolist() == [3, 6]
    two.blocks, two.preemptions = [8, 9], 1
    assert tables.table[tables.rows([one, two])[1], :2].tolist() == [8, 9]
    other = sequence("other", [1], [7])
    assert tables.table[tables.rows([other, two])[0], 0] == 7


@given(st.lists(st.integers(1, 3000), max_size=80), st.sampled_from([1, 16]))
def test_groups_cover_all_decodes_in_order_with_bounded_padding(lengths, block_tokens):
    lengths = sorted(lengths, reverse=True)
    groups = group_lengths(lengths, block_tokens)
    assert [n for group in groups for n in range(group.start, group.stop)] == list(range(len(lengths)))
    for group in groups:
        blocks = [-(-length // block_tokens) for length in lengths[group]]
        padding = max(blocks) * len(blocks) - sum(blocks)
        assert padding <= max(PADDING_BLOCKS_MAX, sum(blocks) // 4)


def test_like_lengths_stay_in_one_group():
    assert group_lengths([130, 129, 120, 100, 90], 16) == [slice(0, 5)]
    assert len(group_lengths([4000, *[100] * 31], 16)) == 2
