"""The graph of a model: its view, known shapes and values, costs of layers, and exact preparations."""

from __future__ import annotations
