"""Allocation: costs, ranking scopes, knapsacks and thresholds that determine how many units each group keeps."""
