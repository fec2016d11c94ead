"""What the processes of a mount share: request slots, pipes, messages, counters."""
