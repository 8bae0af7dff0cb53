"""Everything that is known of operators, a file for each family: labels, rewriting, shapes, values, cost, matrix form.

``registry``, ``codes`` and ``operands`` stand below the graph, which asks the registry; families stand above labels.
"""

from __future__ import annotations
