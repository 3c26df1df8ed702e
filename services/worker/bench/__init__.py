"""The engine measured in its own process, without a mesh, and beside it a peer in another one.

Torch is in these processes; grpc, generated code and the command line are not, so that they also run on
a machine with an accelerator where those are missing. What they find goes to the standard output, one
`tokenloom.bench.lines` object a line.
"""
