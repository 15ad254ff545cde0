"""Data of the two settings of the paper."""
