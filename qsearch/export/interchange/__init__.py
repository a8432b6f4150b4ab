"""Formats that other programs read: a program's network in real numbers, with rounding where its values are integers."""
