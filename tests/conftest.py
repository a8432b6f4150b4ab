"""The presence of this file puts `tests/` on the import path: tests share `analytic.py`."""
