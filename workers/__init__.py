"""The worker processes, which do the data I/O."""
