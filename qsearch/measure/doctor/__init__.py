"""What a machine needs in order to search on it, looked at piece by piece."""
