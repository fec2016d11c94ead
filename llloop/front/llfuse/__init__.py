"""The plain loop (`--loop llfuse`): llfuse receives the requests and calls llloop's handlers."""
