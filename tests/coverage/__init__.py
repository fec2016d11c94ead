"""Which lines of llloop are run by tests, in whatever process."""
