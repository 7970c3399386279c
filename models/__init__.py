"""The two networks, the families of public checkpoints, the reader of untrusted files, and what users can choose."""
