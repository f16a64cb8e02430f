"""The training loop: steps, checkpoints, ranks, what a run says of itself."""
