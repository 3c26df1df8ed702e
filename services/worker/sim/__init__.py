"""The sim engine: a process that speaks the step protocol and only pretends to compute.

It plans its steps with the real scheduler, so admission, chunked prefill and pre-emption behave as
with a model; a step then takes the time that a law says, and tokens are a pure function of seed and
position. It knows no torch and reads no weights: for load tests, and for working on the mesh.
"""
