"""Inference core for early-exit image cascades."""
