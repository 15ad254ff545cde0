"""What a model does and how it is built, over the checkpoints of a run."""
