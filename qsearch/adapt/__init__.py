"""Drift of a deployed module's tensors, and new scales for it without a compiler."""
