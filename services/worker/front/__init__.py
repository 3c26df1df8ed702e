"""The front's own state: which sequences it holds, which models are resident, what it reports.

`sequence.py` and `admission.py` are plain state without I/O. `engine.py` keeps one engine process
alive, `models.py` makes models resident, `publisher.py` pushes load reports, `worker.py` joins them.
Nothing here knows gRPC, files or processes: those are the adapters, behind `ports.py`.
"""
