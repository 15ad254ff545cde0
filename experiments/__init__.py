"""Runnable modules: `python -m experiments.NAME --flag=value`."""
