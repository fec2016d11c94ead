"""The control socket's protocol, its client, and the search for mounts."""
