"""The two networks, what their tensors cannot say, and the reader of public checkpoints."""
