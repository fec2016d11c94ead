"""The front process, which takes the kernel's requests and never waits for a worker."""
