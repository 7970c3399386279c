"""One module per family of public checkpoints: key patterns, configuration, renamed tensors."""
