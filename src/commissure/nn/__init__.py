"""Sequence mixers, one file each, and Stack."""
