"""What `deploy` runs: the stages of every verb, joined in one folder."""
