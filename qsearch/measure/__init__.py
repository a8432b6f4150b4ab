"""Latency, memory and accuracy of compiled modules."""
