"""The benchmark behind scripts/bench: llloop, its peers and the native directory under the same load, in one run."""
