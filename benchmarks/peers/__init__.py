"""Training epochs beside those of other programs, in turns, on the same work."""
