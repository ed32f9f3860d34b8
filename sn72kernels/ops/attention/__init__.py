"""Attention of a vision transformer: every token sees every token."""
