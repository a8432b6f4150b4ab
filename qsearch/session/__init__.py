"""What a whole command does, for the command line and for Python alike: a search from model to front, an export."""
