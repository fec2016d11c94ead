"""llloop as administrators deploy it: packages, systemd, fstab, containers."""
