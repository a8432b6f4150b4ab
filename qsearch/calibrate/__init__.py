"""Observers, the statistics record, and activation ranges derived from it."""
