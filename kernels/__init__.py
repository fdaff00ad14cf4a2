"""Faster versions of PyTorch operations, with the same results."""
