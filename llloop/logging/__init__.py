"""Logging: setup, transport of records between processes, escaping, stack dumps."""
