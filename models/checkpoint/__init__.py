"""From a checkpoint file to a network: safe reader, recognition of the dialect, resolution of ambiguities."""
