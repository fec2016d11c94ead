"""What the processes of a mount share: memory, pipes, messages, counters."""
