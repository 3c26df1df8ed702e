"""Weighted fair service over virtual time: tenants that always wait are served by their weights.

Workers here compute a prompt in their first step and `TOKENS_A_STEP` of every answer in each, report after
every step, and tell every fifth time what they computed for whom, as real ones do.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.batcher.core.flows import OUTPUT_COST, OUTPUT_TOKENS_UNKNOWN, PROMPT_COST
from services.batcher.core.messages import Dispatch, Usage
from services.batcher.core.scheduler import Scheduler
from tests.unit.batcher.words import limits, model_report, report, request, served

STEP_S = 0.05
TOKENS_A_STEP = 8
STEPS_A_TELLING = 5
STEPS_MAX = 4_000
BAND = 2


@dataclass
class Customer:
    """A tenant that always has requests waiting."""

    weight: float
    prompt_max: int
    output_max: int

    def request_share(self):
        """The most that one request may be expected to cost, over the weight."""
        output = max(self.output_max, OUTPUT_TOKENS_UNKNOWN)
        return (PROMPT_COST * self.prompt_max + OUTPUT_COST * output) / self.weight


@dataclass
class Running:
    ticket: int
    tenant: str
    prompt: int
    output: int
    done: int = 0


class Mesh:
    """A scheduler, virtual workers, and what each tenant was really served."""

    def __init__(self, customers, workers, slots, seed):
        self.customers = customers
        self.slots = slots
        self.backlog = workers * slots + 1
        self.random = Random(seed)
        weights = {tenant: customer.weight for tenant, customer in customers.items()}
        self.scheduler = Scheduler(limits(tenant_weights=weights, report_stale_s=1e6), "lease")
        self.running: dict[str, list[Running]] = {f"w{number}": [] for number in range(workers)}
        self.told = {endpoint: {tenant: [0, 0] for tenant in customers} for endpoint in self.running}
        self.waiting: dict[str, int] = dict.fromkeys(customers, 0)
        self.sent: dict[int, Running] = {}
        self.service = dict.fromkeys(customers, 0.0)
        self.starts: Counter[str] = Counter()
        self.now = 0.0
        self.steps = 0
        for endpoint in self.running:
            self.scheduler.worker_found(endpoint)
            self.report(endpoint)

    def report(self, endpoint):
        running = self.running[endpoint]
        telling = not self.steps % STEPS_A_TELLING
        lines = [(tenant, BAND, *counts) for tenant, counts in self.told[endpoint].items()]
        free = self.slots - len(running)
        load = model_report(free, block_tokens=0, total_blocks=0, sequences_max=self.slots)
        active = [f"r{each.ticket}" for each in running]
        sent = report(load, active=active, news=[served(*lines)] if telling else [])
        self.perform(self.scheduler.load_reported(endpoint, sent, self.now))

    def perform(self, effects):
        for effect in effects:
            assert isinstance(effect, Dispatch) or not hasattr(effect, "reason")
            if isinstance(effect, Dispatch):
                sequence = self.sent[effect.ticket]
                self.waiting[sequence.tenant] -= 1
                self.starts[sequence.tenant] += 1
                self.running[effect.endpoint].append(sequence)

    def ask(self, tenant):
        customer, ticket = self.customers[tenant], len(self.sent) + 1
        prompt = self.random.randint(1, customer.prompt_max)
        output = self.random.randint(1, customer.output_max)
        self.sent[ticket] = Running(ticket, tenant, prompt, output)
        self.waiting[tenant] += 1
        asked = request(f"r{ticket}", tenant=tenant, prompt=prompt, priority=BAND, max_new_tokens=2000)
        self.perform(self.scheduler.request_arrived(ticket, asked, self.now))

    def step(self):
        self.now += STEP_S
        self.steps += 1
        for tenant, waiting in list(self.waiting.items()):
            for _ in range(self.backlog - waiting):
                self.ask(tenant)
        for endpoint, running in self.running.items():
            for sequence in list(running):
                self.compute(endpoint, sequence)
            self.report(endpoint)

    def compute(self, endpoint, sequence):
        prompt = 0 if sequence.done else sequence.prompt
        output = min(TOKENS_A_STEP, sequence.output - sequence.done)
        sequence.done += output
        counts = self.told[endpoint][sequence.tenant]
        counts[0] += prompt
        counts[1] += output
        self.service[sequence.tenant] += PROMPT_COST * prompt + OUTPUT_COST * output
        if sequence.done == sequence.output:
            self.running[endpoint].remove(sequence)
            usage = Usage(sequence.prompt, 0, sequence.output)
            self.perform(self.scheduler.stream_ended(sequence.ticket, usage, self.now))

    def shares(self):
        """By tenant, service over weight."""
        return {tenant: tokens / self.customers[tenant].weight for tenant, tokens in self.service.items()}


def jain(values):
    values = list(values)
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


customers = st.builds(
    Customer,
    weight=st.sampled_from([0.5, 1.0, 1.0, 2.0, 4.0]),
    prompt_max=st.sampled_from([10, 100, 1000]),
    output_max=st.sampled_from([8, 50, 200]),
)


@given(
    customers=st.lists(customers, min_size=2, max_size=5),
    workers=st.integers(1, 3),
    slots=st.integers(1, 4),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=25, deadline=None)
def test_no_backlogged_tenant_falls_behind_another_by_more_than_a_few_requests(
    customers, workers, slots, seed
):
    mesh = Mesh({f"t{number}": each for number, each in enumerate(customers)}, workers, slots, seed)
    least, most = {}, {}
    for _ in range(200):
        mesh.step()
        shares = mesh.shares()
        for pair in combinations(shares, 2):
            gap = shares[pair[0]] - shares[pair[1]]
            least[pair] = min(least.get(pair, gap), gap)
            most[pair] = max(most.get(pair, gap), gap)
    for pair in least:
        # What runs is only estimated: either counter may be off by one request for each place to run.
        request_share = max(mesh.customers[tenant].request_share() for tenant in pair)
        assert most[pair] - least[pair] <= 2 * (workers * slots + 1) * request_share


@given(customers=st.lists(customers, min_size=2, max_size=6), seed=st.integers(0, 1 << 16))
@settings(max_examples=5, deadline=None)
def test_over_a_long_run_service_follows_the_weights(customers, seed):
    mesh = Mesh({f"t{number}": each for number, each in enumerate(customers)}, 2, 3, seed)
    enough = 60 * max(customer.request_share() for customer in customers)
    while min(mesh.shares().values()) < enough and mesh.steps < STEPS_MAX:
        mesh.step()
    assert jain(mesh.shares().values()) >= 0.98
