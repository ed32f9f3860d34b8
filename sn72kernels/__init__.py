"""Triton kernels for image cascades, each beside a plain PyTorch reference."""
