"""The commands `llloop` and `mount.llloop`."""
