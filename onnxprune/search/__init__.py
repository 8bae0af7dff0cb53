"""The search for the best model within a budget: candidates are made, pruned, recovered, evaluated and compared."""
