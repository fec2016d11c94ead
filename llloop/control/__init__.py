"""The control socket: its protocol, its client, and the discovery of mounts."""
