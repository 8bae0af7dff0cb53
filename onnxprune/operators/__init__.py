"""Operator rules, one file per family: labels, rewriting, shapes, values, cost, matrix form.

``registry``, ``codes`` and ``operands`` are layers below the graph, which queries the registry; the families are
layers above the labels.
"""

from __future__ import annotations
