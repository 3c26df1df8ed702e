"""The gateway's hands: the modelstore, tokenizers, templates, and the mesh."""
