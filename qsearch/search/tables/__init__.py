"""What layers cost and what they do to the outputs, measured once before the first trial."""
