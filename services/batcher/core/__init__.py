"""The scheduling core: events and the time go in, effects come out.

Nothing here does I/O, reads a clock or draws a random number, so that the same code runs in
production, under property tests and in a simulator. Start with `scheduler.py`; the words it uses are
in `messages.py`.
"""
