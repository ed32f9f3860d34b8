"""Weighted vote of several models with abstention."""
