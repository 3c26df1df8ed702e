"""The scheduling of one engine: sequences arrive, steps are planned and settled, blocks change hands.

Nothing here does I/O, reads a clock or knows a tensor, so that the same code runs under the real engine,
the simulated one and the property tests. Start with `scheduler.py`; what a sequence is stands in
`sequence.py`, who holds which blocks in `blocks.py`.
"""
