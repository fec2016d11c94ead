"""Views: what a mount shows or allows otherwise than its source. A mount without such options uses nothing of it."""
