"""Model files: lazy reading, weights that are read when needed, atomic writing, subgraphs, interchange."""

from __future__ import annotations
