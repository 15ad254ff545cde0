"""Measurements of speed, memory and compilation; never imported by the package."""
