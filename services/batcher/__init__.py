"""Batcher: the batching queue. It decides who runs next, where, and who is refused.

Envoy asks it once a request, through its own ext_proc contract, and waits: a request stays in the
batcher, not in a worker, until a worker can start it now. Tokens never pass through here.

`core/` holds all decisions, without I/O: events and the time in, effects out. `driver.py` performs the
effects, `servicer.py` translates the gRPC contracts, `adapters/` speak to Envoy and to the workers.

`simulate/` drives the same core over virtual time on recorded traffic, beside the policies of others.

Replicas share nothing. Each learns from the workers' pushed reports what they can take, and orders by
the request's own arrival time; a worker that two replicas chose at once refuses one of the requests.
"""

from pathlib import Path

from tokenloom.native import prefer_compiled

prefer_compiled("services.batcher.core", Path(__file__).with_name("core"))
