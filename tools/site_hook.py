"""Hook of the site: an option such as ``--data`` is never broken after its hyphens, which narrow screens would do."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Return the page with every option in inline code on one line."""
    option = r'<span style="white-space: nowrap">\1</span>'
    return re.sub(r"<code>[^<]*</code>", lambda code: re.sub(r"(?<!\w)(-{1,2}[a-z][\w-]*)", option, code[0]), html)
