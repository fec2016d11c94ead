"""Interfaces of Linux: system calls, FUSE structs, credentials, mounts and limits."""
