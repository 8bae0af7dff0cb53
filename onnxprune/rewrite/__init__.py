"""Rewriting: the only stage that changes weights and shapes."""
