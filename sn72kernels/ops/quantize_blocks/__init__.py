"""Quantise to nvfp4 and mxfp8, where blocks of a row share a scale, and back."""
