"""Quantization-aware fine-tuning: train through the rounding, then lower and measure as any other configuration."""
