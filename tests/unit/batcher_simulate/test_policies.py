"""What the policies of others would do, on fleets small enough to see it."""

from random import Random

import pytest

from services.batcher.core.messages import (
    LoadReport,
    ModelNews,
    ModelReport,
    ModelState,
    PrefixChanges,
    Request,
    Usage,
)
from services.batcher.simulate.policies import POLICIES
from services.batcher.simulate.policies.dynamo import Dynamo
from services.batcher.simulate.policies.scorers import Gaie, LlmD
from services.batcher.simulate.reports import MODEL, TENANT
from tests.unit.batcher_simulate.made import H100, LIMITS, arrival, policy, prefix, run, small


def request(number, blocks=(), prompt=None):
    tokens = prompt if prompt is not None else len(blocks) * 512 + 100
    return Request(f"r{number}", MODEL, TENANT, 2, 0, 600.0, tokens, 2000, prefix=prefix(*blocks))


def report(*, waiting=0, free_blocks=100, stored=(), evicted=(), whole=False):
    model = ModelReport(MODEL, ModelState.READY, free_blocks=free_blocks, total_blocks=100, waiting=waiting)
    news = ModelNews(MODEL, PrefixChanges(whole, tuple(stored), tuple(evicted)))
    return LoadReport("boot", False, (model,), news=(news,))


def chosen(policy, number, asked):
    (decision,) = policy.arrived(number, asked, 0.0)
    assert decision.number == number
    return decision.worker


def test_round_robin_takes_turns():
    turns = policy("round_robin", H100, 3)
    assert [chosen(turns, n, request(n)) for n in range(5)] == [0, 1, 2, 0, 1]


def test_random_takes_them_all_and_the_seed_decides_the_order():
    one, other = (
        [chosen(made, n, request(n)) for n in range(50)]
        for made in (policy("random", H100, 3, seed) for seed in (0, 0))
    )
    assert one == other
    assert set(one) == {0, 1, 2}


def test_least_request_counts_what_is_under_way():
    least = policy("least_request", H100, 3)
    assert {chosen(least, n, request(n)) for n in range(3)} == {0, 1, 2}
    freed = least.sent_to[1]
    least.ended(1, Usage(0, 0, 0), 1.0)
    assert chosen(least, 3, request(3)) == freed


def test_prefix_only_follows_the_longest_match_whatever_the_load():
    affine = policy("prefix_only", H100, 3)
    affine.reported(1, report(stored=prefix(1)), 0.0)
    affine.reported(2, report(stored=prefix(1, 2)), 0.0)
    assert [chosen(affine, n, request(n, (1, 2))) for n in range(3)] == [2, 2, 2]
    affine.reported(2, report(evicted=prefix(1, 2)), 0.0)
    assert chosen(affine, 3, request(3, (1, 2))) == 1
    assert chosen(affine, 4, request(4, (9,))) == 0


def test_gaie_weighs_queue_cache_and_prefix():
    scorer = Gaie(2, Random(0), 16_000)
    for worker, waiting in ((0, 4), (1, 0)):
        scorer.reported(worker, report(waiting=waiting, free_blocks=50), 0.0)
    assert chosen(scorer, 0, request(0, (1, 2))) == 1
    scorer.reported(1, report(waiting=4, free_blocks=50), 0.0)
    assert chosen(scorer, 1, request(1, (1, 2))) == 1, "its prefix was sent there"
    scorer.reported(1, report(waiting=5, free_blocks=20), 0.0)
    assert chosen(scorer, 2, request(2, (1, 2), prompt=4096)) == 0, (
        "2 for the queue and 1 for the cache beat 0.75"
    )


def test_gaie_forgets_what_it_sent_long_ago():
    scorer = Gaie(1, Random(0), 1024)
    chosen(scorer, 0, request(0, (1, 2)))
    chosen(scorer, 1, request(1, (3,)))
    assert scorer.shares(request(2, (1, 2))) == [0.0]
    assert scorer.shares(request(2, (3,)))[0] > 0.8


def test_gaie_looks_at_the_first_blocks_only():
    scorer = Gaie(1, Random(0), 100_000)
    long = tuple(range(20))
    chosen(scorer, 0, request(0, long))
    assert scorer.shares(request(1, (*long[:8], *range(100, 112)))) == [1.0]


def test_llm_d_believes_the_workers():
    scorer = LlmD(2, Random(0))
    assert chosen(scorer, 0, request(0, (1, 2))) in (0, 1)
    scorer.reported(1, report(stored=prefix(1, 2), free_blocks=10), 0.0)
    scorer.reported(0, report(), 0.0)
    assert chosen(scorer, 1, request(1, (1, 2))) == 1, "2 for the prefix beat 0.9 for the cache"
    scorer.reported(1, report(whole=True), 0.0)
    scorer.reported(1, report(free_blocks=50), 0.0)
    assert chosen(scorer, 2, request(2, (1, 2))) == 0


def dynamo(workers=2, threshold=4.0):
    return Dynamo(workers, Random(0), block_tokens=16, step_tokens_max=2048, queue_threshold=threshold)


def test_dynamo_trades_cached_blocks_for_load():
    router = dynamo()
    router.reported(1, report(stored=prefix(1, 2)), 0.0)
    assert chosen(router, 0, request(0, (1, 2))) == 1
    assert chosen(router, 1, request(1, (5,) * 10)) == 0
    assert chosen(router, 2, request(2, (1, 2))) == 1, "its blocks are shared there"
    router.first_token(1, 0.5)
    router.ended(1, Usage(0, 0, 0), 1.0)
    assert chosen(router, 3, request(3, (7,))) == 0


def test_dynamo_holds_requests_while_every_worker_has_prompts_for_some_steps():
    router = dynamo()
    for number in range(2):
        chosen(router, number, request(number, prompt=9000))
    assert router.arrived(2, request(2), 0.0) == []
    assert router.arrived(3, request(3), 0.0) == []
    assert router.waiting == 2
    released = router.first_token(0, 1.0)
    assert [each.number for each in released] == [2, 3]
    assert router.waiting == 0


def test_dynamo_without_a_threshold_holds_nothing():
    router = dynamo(threshold=0.0)
    assert [chosen(router, n, request(n, prompt=9000)) for n in range(4)].count(0) == 2


def test_dynamo_forgets_requests_that_ended():
    router = dynamo(1)
    for number in range(3):
        chosen(router, number, request(number, (1, number)))
        router.first_token(number, 0.0)
        router.ended(number, Usage(0, 0, 0), 0.0)
    book = router._books[0]
    assert (book.active_prefill_tokens, book.pages, book.single_blocks) == (0, {}, 0)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_no_policy_needs_the_length_of_an_answer(name):
    assert "output_tokens" not in Request._fields
    made = [arrival(at / 10, 300, 10) for at in range(20)]
    longer = [each._replace(output_tokens=11) for each in made]
    profile = small()
    first, second = (run(name, these, profile)[1] for these in (made[:1], longer[:1]))
    assert first.sent_to == second.sent_to


def test_ours_is_the_core_of_the_batcher():
    ours = POLICIES["tokenloom"](2, H100, LIMITS, Random(0))
    assert ours._scheduler.worker_states() == ["lost", "lost"]
    assert ours.arrived(0, request(0)._replace(deadline=-1.0), 0.0)[0].reason == "DEADLINE_UNREACHABLE"
