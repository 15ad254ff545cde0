"""Flax Linen models; their params are plain dicts."""
