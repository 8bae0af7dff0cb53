"""The search for the cut that keeps most within a budget: answers are made, carried out, repaired and compared."""
