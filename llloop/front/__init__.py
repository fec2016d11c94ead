"""The front process: it receives all requests of the kernel, and never waits for a worker."""
