"""Recover accuracy in closed form: weights that make the cut model's layers say what the original's said."""
