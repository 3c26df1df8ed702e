"""The front's own state: which sequences it holds, which models are resident, what it reports.

`sequence.py` and `admission.py` are plain state without I/O, as are `served.py` and `prefixes.py`, which
hold what a report tells only when it changed. `engine.py` keeps one engine process alive, `models.py` makes
models resident, `report.py` and `publisher.py` make and push load reports, `worker.py` joins them.
Nothing here knows gRPC, files or processes: those are the adapters, behind `ports.py`.
"""
