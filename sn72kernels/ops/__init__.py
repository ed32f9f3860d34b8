"""One folder per op: ``reference.py`` (plain PyTorch), ``kernel.py`` (Triton), ``op.py`` (the rest)."""
