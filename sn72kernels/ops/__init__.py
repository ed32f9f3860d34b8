"""One folder per op: ``reference.py`` (PyTorch), ``kernel.py`` (Triton), ``op.py`` (the rest)."""
