"""Labels: integer arrays that record which removable channel stands at each position."""

from __future__ import annotations
