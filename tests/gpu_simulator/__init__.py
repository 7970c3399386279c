"""A simulated NVIDIA GPU for the tests; see README.md in this folder."""
