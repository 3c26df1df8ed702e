"""Plumbing that every service shares: settings, server, channels, errors, deadlines, telemetry.

The kit imports no service and knows nothing of models, prompts or tokens. What it offers is the
same for any gRPC service: bytes in, typed errors out, one trace, one way to start and to stop.
"""
