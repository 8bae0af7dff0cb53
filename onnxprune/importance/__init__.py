"""Importance of units: criteria, statistics of feature maps, weight and map slots, and scores."""
