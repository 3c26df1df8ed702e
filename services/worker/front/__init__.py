"""The front's own state: which sequences it holds, which models are resident, what it reports.

`sequence.py` and `admission.py` are plain state without I/O, as are `served.py` and `prefixes.py`, which
hold what a report tells only when it changed. `engine.py` keeps one engine process alive. `memory.py` says
what a model takes of the worker's memory and `residency.py` decides who has it and who leaves for whom;
`models.py` carries that out: it makes models (`resident.py`) resident and sends them off. `report.py` and
`publisher.py` make and push load reports, `worker.py` joins them. Nothing here knows gRPC, files or
processes: those are the adapters, behind `ports.py`.
"""
