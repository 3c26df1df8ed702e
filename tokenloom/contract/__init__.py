"""What the services agree on beside the protos: header names, model names, prefix hashes.

Pure standard library, no I/O: every service, the simulator and the tests may import it.
"""
