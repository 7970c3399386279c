"""The command line: one file per verb, and the one error boundary."""
