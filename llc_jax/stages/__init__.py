"""Stages of a curve over training."""
