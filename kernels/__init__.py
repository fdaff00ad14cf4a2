"""Arithmetic that PyTorch's own operations do more slowly; the same numbers."""
