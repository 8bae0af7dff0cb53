"""Labels: integer arrays that say which removable channel stands where."""

from __future__ import annotations
