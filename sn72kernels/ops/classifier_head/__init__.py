"""Features to route: LayerNorm, two linear layers with GELU, sigmoid, thresholds."""
