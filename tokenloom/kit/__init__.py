"""Plumbing that every service shares: settings, server, channels, errors, deadlines, telemetry.

The kit imports no service and knows nothing of models, prompts or tokens. What it offers is the
same for any gRPC service: bytes in, typed errors out, one trace, one way to start and to stop.
"""

import os

# gRPC's newer event engine hands each message through threads of its own before Python sees it. Without
# it the processes of a token stream switch threads half as often and need a tenth less of the CPU.
# The C library reads this when it is first used, so it stands where every service begins.
os.environ.setdefault(
    "GRPC_EXPERIMENTS",
    "-event_engine_client,-event_engine_listener,-event_engine_callback_cq,"
    "-event_engine_for_all_other_endpoints",
)
