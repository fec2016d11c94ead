"""The worker processes, which hold the file descriptors and move the data."""
