"""Targets, the kernel cache, and linking kernels into a Relax executable."""
