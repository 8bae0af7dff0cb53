"""Sparsification: patterns of zeros, scores of single weights, the update that makes up for a zero. Mostly arrays."""
