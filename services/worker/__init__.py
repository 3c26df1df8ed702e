"""Worker: runs sequences on one device, by continuous batching. It sees token ids, never text.

Two kinds of process. The front (`app.py`, `servicer.py`, `front/`, `adapters/`) speaks gRPC and holds
no weights. For each resident model there is one engine process, `engine/` with torch or `sim/`
without; front and engine exchange the messages of `protocol.py`, one a step. A crash of an engine ends
only its own sequences, and the front starts it again.

A worker is the last arbiter of its own capacity: what it cannot hold it refuses before it sends anything.
"""
