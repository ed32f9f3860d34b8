"""LayerNorm and GELU in one pass."""
