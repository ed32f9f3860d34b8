"""Pixels to the tensor a model takes: crop, antialiased resize, normalise, transpose."""
