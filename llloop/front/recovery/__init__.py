"""What matters only after the death of a front."""
