"""What layers cost and what they do to the outputs, measured once to plan trials with."""
