r"""What a terminal may be shown: untrusted text with nothing in it that acts.

Prompts, profile cells, file names and messages of others can hold escape sequences (which move
the cursor, set the title or answer for the user), carriage returns (which overwrite what was
printed before) and bidirectional overrides (which show another order than is stored,
https://trojansource.codes). `visible` writes each of them as JSON would, `\u001b`, so that they
are seen and do nothing. What goes into manifests and other files of data stays as it is.
"""

from __future__ import annotations

import json
import re
import unicodedata

LONGEST_LINE = 4000
"""Characters of a line of a message that are shown."""

# Joiners of Persian, Indic scripts and emoji: they order nothing anew and hide nothing.
_HARMLESS = frozenset("\n\u200c\u200d")
# Control and format characters, lone surrogates, line and paragraph separators.
_ACTING = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_USER_INFO = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s?#@]*@")
_SIGNATURE = re.compile(
    r"(?i)([?&](?:[a-z0-9-]*(?:signature|token|credential|secret)|sig)=)[^&\s]+"
)


def visible(text: object, *, longest: int | None = LONGEST_LINE) -> str:
    r"""`str(text)` as it may be printed.

    Characters that act are written out, newlines aside; user names and passwords in URLs, and
    signatures in their queries, are masked; lines over `longest` characters are cut. JSON stays
    the same JSON (with `longest=None`).
    """
    shown = str(text)
    if not shown.isascii() or not shown.isprintable():
        shown = "".join(_written(c) if _acts(c) else c for c in shown)
    if "://" in shown:
        shown = without_credentials(shown)
    if longest is None or len(shown) <= longest:
        return shown
    return "\n".join(_cut(line, longest) for line in shown.split("\n"))


def visible_line(text: object) -> str:
    r"""The same on one line: a newline is written `\n`, so that no text can pass for a line."""
    return visible(text).replace("\n", "\\n")


def without_credentials(text: str) -> str:
    """`text` with the user's part of its URLs, and signatures in their queries, as `***`."""
    return _SIGNATURE.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def _acts(character: str) -> bool:
    return character not in _HARMLESS and unicodedata.category(character) in _ACTING


def _written(character: str) -> str:
    return json.dumps(character)[1:-1] if character != "\x7f" else "\\u007f"


def _cut(line: str, longest: int) -> str:
    if len(line) <= longest:
        return line
    return f"{line[:longest]} ... and {len(line) - longest:,} characters more"
