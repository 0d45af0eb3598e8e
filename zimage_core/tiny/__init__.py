"""Checkpoints small enough for a laptop and a test suite, in the layout of the real ones."""
