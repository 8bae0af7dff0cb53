"""Groups of channels that can be pruned: analysis, plans, and the survivors of a removal."""
