"""Kernels that make linear attention faster where they run; the PyTorch operator needs none of them."""
