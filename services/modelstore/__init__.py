"""Modelstore: immutable model versions, moving aliases, verified blobs. It runs no model.

A version is a small JSON manifest whose digest is its name; its files are blobs named by their own
digests; an alias is a series of numbered records that can only be created, so replicas on one store
need no lock. Bytes are written in the order blobs, manifest, alias: a kill at any moment leaves the old
state, and an import that is repeated gives the same version.

`core/` holds every rule without doing any I/O. `store.py` and `importer.py` carry the rules out over the
ports of `core/ports.py`; `converter/` is a process of its own and the only part that has torch.
"""
