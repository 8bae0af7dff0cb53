"""Model files: lazy reading, weights read on demand, atomic writing, subgraphs, interchange."""

from __future__ import annotations
