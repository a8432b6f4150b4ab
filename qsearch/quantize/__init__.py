"""Affine arithmetic, weight preparation, the NumPy reference, and lowering to an integer program."""
