"""The graph of a model: its view, what is known of shapes and values, what layers cost, and exact preparations."""

from __future__ import annotations
