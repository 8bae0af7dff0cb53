"""Take layers apart: which ones, at which ranks, and the nodes and weights that stand in their place."""
