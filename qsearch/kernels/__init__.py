"""Kernel descriptions and their generators."""
