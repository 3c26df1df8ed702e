"""One model on one device: transformers supplies the model; scheduling, cache, attention, sampling are ours.

A step goes through the files in this order: `loop.py` takes commands from the socket (`pipeline.py` lets
steps overlap where that is asked for), `engine.py` asks the core for a plan, `layout.py` lays its tokens
out flat, `runner.py` runs the model, whose layers call a cache (`caches.py` chooses: `cpu/cache.py` or
`gathered.py`) in the terms of `attention.py`, and `sampling.py` draws. `loader.py` is what happens before:
`support.py` and `memory.py` say whether the model may be loaded, `linear.py` and `fused.py` rearrange it
for speed, `operations.py` is what a plain layer does between its products. `shortage.py` recognises that
memory ran out; what then, the core decides.

Nothing here imports grpc or generated code. Equal tokens across batches are claimed in float32 only.
"""
