"""Small machines and small traffic for tests of the simulator."""

import json
from random import Random

import msgspec
from hypothesis import strategies as st

from services.batcher.settings import BatcherSettings
from services.batcher.simulate import law
from services.batcher.simulate.mesh import Mesh
from services.batcher.simulate.metrics import Slo
from services.batcher.simulate.policies import POLICIES
from services.batcher.simulate.trace import Arrival, chained
from tokenloom.kit.settings import load_settings

H100 = law.load("h100-8b")
LIMITS = load_settings(BatcherSettings, {}).limits()
SLO = Slo(2.0, 0.025)


def small(**changes):
    """A worker that holds 4,096 tokens and steps over 256 of them."""
    values = {"kv_tokens": 4096, "sequences_max": 8, "step_tokens_max": 256} | changes
    return msgspec.structs.replace(H100, name="small", **values)


def prefix(*blocks):
    """The numbers of a prompt whose whole blocks are these."""
    number, numbers = 0, []
    for block in blocks:
        number = chained(number, block)
        numbers.append(number)
    return tuple(numbers)


def arrival(at=0.0, prompt=600, output=20, blocks=None):
    """One request; its whole blocks are unlike any other's unless named."""
    whole = prompt // 512
    names = (
        blocks
        if blocks is not None
        else [hash((at, prompt, output, place)) & 0xFFFF for place in range(whole)]
    )
    return Arrival(at, prompt, output, prefix(*names[:whole]))


@st.composite
def arrivals(draw, *, count=12, within_s=2.0, prompt_max=2000, output_max=200):
    """Requests that often share their first blocks."""
    made = []
    for _ in range(draw(st.integers(1, count))):
        at = draw(st.floats(0, within_s, allow_nan=False))
        prompt = draw(st.integers(1, prompt_max))
        blocks = draw(st.lists(st.integers(0, 1), min_size=prompt // 512, max_size=prompt // 512))
        made.append(arrival(at, prompt, draw(st.integers(1, output_max)), blocks))
    return sorted(made, key=lambda each: each.at)


def policy(name, profile, workers=2, seed=0):
    return POLICIES[name](workers, profile, LIMITS, Random(seed))


def run(name, made, profile, workers=2, slo=SLO, seed=0):
    """The mesh after a run, and its record."""
    mesh = Mesh(made, policy(name, profile, workers, seed), profile, workers, slo.ttft_s)
    return mesh, mesh.run()


def trace_file(path, count=50, seed=1):
    """A trace in the Mooncake format: conversations that come back with a longer prompt."""
    random = Random(seed)
    chats = [[chat * 1000] for chat in range(8)]
    lines = []
    for number in range(count):
        chat = random.choice(chats)
        chat.append(chat[0] + len(chat))
        tokens = len(chat) * 512 - random.randrange(1, 512)
        entry = {
            "timestamp": number // 5 * 3000,
            "input_length": tokens,
            "output_length": random.randrange(1, 300),
            "hash_ids": list(chat),
        }
        lines.append(json.dumps(entry))
    path.write_text("\n".join(lines) + "\n")
    return path
