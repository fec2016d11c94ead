"""The plain loop: llfuse's own, with llloop's file system behind it."""
