"""Bundles: writing, verifying, running."""
