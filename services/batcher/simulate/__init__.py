"""The batcher's core over virtual time: recorded traffic, simulated workers, and other policies beside it.

It answers one question before any GPU is rented: at which rate does a policy still keep its promises?
Nothing here is part of a running batcher, and the core knows nothing of it.

    trace.py     a recorded trace as requests with arrival times, at any rate
    law.py       how long a step takes: a profile of constants, calibrated from the engine's benchmark
    kv.py        one worker's KV blocks and prefix cache
    worker.py    one worker: continuous batching in virtual time (sequence.py, speeds.py, reports.py)
    policies/    who goes where: ours (the real core) and the others
    mesh.py      the event loop: arrivals, steps, reports, decisions (record.py: what happened)
    metrics.py   what came of it
    bound.py     what no policy can exceed
    search.py    the highest rate that a policy bears
    sweep.py     all of it, over policies and rates, on all cores
    plot.py      one picture of it
"""
