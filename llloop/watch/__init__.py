"""Hearing what happens in the source, and making the kernel drop what it has cached of it (`--watch`)."""
