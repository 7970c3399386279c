"""What `deploy` runs, and the functions that it shares with the verbs: open, verify, measure, write the bundle."""
