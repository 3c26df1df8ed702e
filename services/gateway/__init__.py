"""The gateway: a stateless API server between callers' text and the mesh's token ids.

Owns validation, model names, chat templates, tokenising, detokenising, stop strings, re-sending and
the resume of broken streams, over gRPC and OpenAI-compatible HTTP. It never chooses a worker, never
touches weights, and never imports torch or transformers.
"""
