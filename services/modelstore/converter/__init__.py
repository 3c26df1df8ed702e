"""The converter: a process of its own that turns a checked source into safetensors and a tokenizer.

The only part of the modelstore that imports torch and transformers. It writes into the folder it is
given and nowhere else, runs no code of the source's, and ends when its parent does.
"""
