"""The dependencies that pyproject.toml declares: every oldest release is one that continuous integration installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_oldest_releases_are_those_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lowest = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<\d+)?", line).groups() for line in declared)  # type: ignore[union-attr]
    lines = (ROOT / ".ci" / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pinned.keys() == lowest.keys()
    for name, version in lowest.items():
        assert f"{pinned[name]}.".startswith(f"{version}."), f"{name} is declared from {version} on"
