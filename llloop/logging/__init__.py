"""The log: its setup, its way from every process to one place, and stacks."""
