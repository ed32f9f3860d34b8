"""Quantise to int8 and fp8, and back."""
