"""Factorization of layers: decompositions, choice of ranks, and rewriting."""
