"""Training: optimizers, batches, and a loop that runs blocks of steps as one program."""
