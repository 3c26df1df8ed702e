"""What a block holds has one name everywhere, and a name alone proves nothing."""

from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.prefix import Content, root, same
from tokenloom.contract.prefix import block_hashes, root_hash

ids = st.lists(st.integers(0, 2**32 - 1), max_size=80)


def chain(tokens, key=b"", size=4):
    contents = [root(key)]
    for start in range(0, len(tokens) - size + 1, size):
        contents.append(contents[-1].then(tokens[start : start + size]))
    return contents


@given(ids, st.text(max_size=8), st.sampled_from([1, 4, 16]))
def test_the_engine_names_a_prefix_as_gateway_and_batcher_do(tokens, salt, size):
    key = root_hash("sha256:ab", salt)
    keys = [content.key for content in chain(tokens, key, size)[1:]]
    assert keys == block_hashes(tokens, key, size)


@given(ids)
def test_two_chains_of_the_same_tokens_are_the_same(tokens):
    assert all(same(one, other) for one, other in zip(chain(tokens), chain(tokens), strict=True))


def test_chains_differ_by_root_by_any_earlier_token_and_by_length():
    whole = chain([1, 2, 3, 4, 5, 6, 7, 8])
    assert not same(whole[2], chain([1, 2, 3, 4, 5, 6, 7, 8], b"salt")[2])
    assert not same(whole[2], chain([9, 2, 3, 4, 5, 6, 7, 8])[2])
    assert not same(whole[2], whole[1])


def test_an_equal_key_is_not_enough():
    one, other = root(b"").then([1]), root(b"").then([2])
    forged = Content(one.key, other.data, other.parent)
    assert not same(one, forged)
    assert not same(one.then([3]), Content(one.then([3]).key, one.then([3]).data, forged))
