"""Budgets: what a model costs as a function of how many units every group keeps, and which counts keep most."""
