"""The supervisor process: it owns the mount and keeps the other processes running."""
