"""Tools that make checkpoints: honest ones of every container, hostile ones, and mutations of both."""
