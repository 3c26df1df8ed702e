"""The scheduling of one engine: sequences arrive, steps are planned and settled, blocks change hands.

Nothing here does I/O, reads a clock or knows a tensor, so that the same code runs under the real engine,
the simulated one and the property tests. Start with `scheduler.py`; its words stand in `plan.py`, what a
sequence is in `sequence.py`, who holds which blocks and which of them a prompt finds in `blocks.py` and
`prefix.py` (and what of that is news to others in `changes.py`), what happens when memory runs out in
`pressure.py`.
"""
