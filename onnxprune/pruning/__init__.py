"""Rewriting of pruned models and their proof: the only stage that changes weights and shapes."""

from __future__ import annotations
