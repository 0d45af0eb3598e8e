"""The gallery's HTML: one file with its style, its script and its data, that loads nothing else.

Whatever a table or a message says is data in it, never markup: JSON in which no `<` is left, which
the script shows as text. A content security policy lets nothing run but this very script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

GENERATOR = "zimage gallery"
"""What a page of ours names in its head."""
_FOLDER = Path(__file__).parent / "gallery_page"
_SCRIPTS = ("rows", "text", "filters", "commands", "grid", "panel", "marks", "main")
# As JSON escapes them: what could end a script element, begin another, or end a line of JavaScript.
_ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_IMAGES = {"file": "'self' file: data:", "embed": "data:", "served": "'self' data:"}


def html_page(facts: Mapping[str, object], blocks: Mapping[str, object]) -> str:
    """The whole page.

    Args:
        facts: of `gallery_rows.facts`, and `mode`: `file` reads its images beside itself, `embed`
            holds its thumbnails, `served` asks for rows and images.
        blocks: further data of the page by name: `rows`, `thumbnails`.
    """
    style, script = _style(), _script()
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; "
        f"img-src {_IMAGES[str(facts['mode'])]}; base-uri 'none'; form-action 'none'"
    )
    if facts["mode"] == "served":
        policy += "; connect-src 'self'"
    data = "\n".join(
        f'<script type="application/json" id="{name}">{json_text(value)}</script>'
        for name, value in {"facts": facts, **blocks}.items()
    )
    pieces = {
        "generator": GENERATOR,
        "policy": html.escape(policy, quote=True),
        "title": html.escape(str(facts["name"])),
        "style": style,
        "script": script,
        "data": data,
    }
    # in one pass, so that no piece is looked into for places
    return _PLACE.sub(lambda match: pieces[match[1]], _read("page.html"))


def json_text(value: object) -> str:
    """JSON that may stand inside a script element. Raises ValueError for numbers JSON has not."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPED)


@cache
def _style() -> str:
    return _read("style.css")


@cache
def _script() -> str:
    parts = [_read(f"{name}.js") for name in _SCRIPTS]
    return '"use strict";\n' + "\n".join(parts)


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """A policy's name for an inline element of this content."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
