"""Inference backends behind one protocol, chosen by name."""
