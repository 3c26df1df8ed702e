"""The front's outside: engine processes, the modelstore, the disk, this machine's memory, spans."""
