"""A page of headings, text, tables and pictures, as HTML or as Markdown.

Whatever a table, a message or a name says is text in it: in HTML its special characters are
escaped and a content security policy lets nothing run or load; in Markdown what could begin markup,
an address or another cell has a backslash in front. Characters that act on a reader (control,
bidirectional) are written out.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from jobs.terminal import visible_line

_LONGEST = 400  # characters of a cell
# What CommonMark and GitHub's dialect give a meaning to within a line: a backslash takes it away.
_MARKUP = re.compile(r"[\\`*_\[\]#|<>&~$]|:(?=//)|(?<=www)\.", re.IGNORECASE)


@dataclass(frozen=True)
class Picture:
    """A small picture in a cell; Markdown has none there.

    Attributes:
        content: of a PNG, JPEG or WebP file.
        kind: `png`, `jpeg` or `webp`.
        words: in place of it, for those who do not see it.
    """

    content: bytes
    kind: str
    words: str


Cell = str | Picture | tuple[str, ...]
"""Text, a picture, or lines of text."""


@dataclass(frozen=True)
class Heading:
    """Begins a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text."""

    text: str


@dataclass(frozen=True)
class Command:
    """A line for a shell."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells in rows.

    Attributes:
        columns: their headings; those that begin with `#` are numbers, set to the right.
        rows: as many cells each.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Plot:
    """A drawing.

    Attributes:
        name: of its file beside a page in Markdown: letters and hyphens.
        words: what it shows.
        svg: the file.
    """

    name: str
    words: str
    svg: bytes


Block = Heading | Paragraph | Command | Table | Plot


def html_page(title: str, blocks: Sequence[Block], generator: str) -> str:
    """One HTML file that holds all it shows.

    Args:
        generator: named in the head, so that the file is known again.
    """
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:"
    body = "\n".join(map(_html_block, blocks))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{html.escape(generator)}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{html_text(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body><main>
<h1>{html_text(title)}</h1>
{body}
</main></body>
</html>
"""


def markdown_page(title: str, blocks: Sequence[Block], generator: str, stem: str) -> str:
    """A page in GitHub's Markdown.

    Args:
        generator: see `html_page`.
        stem: of the page's file; plots are in `STEM-NAME.svg` beside it (see `plot_file`).
    """
    parts = [f"<!-- {generator} -->", f"# {markdown_text(title)}"]
    parts += [_markdown_block(block, stem) for block in blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def plot_file(stem: str, plot: Plot) -> str:
    """The name of a plot's file beside a Markdown page."""
    return f"{stem}-{plot.name}.svg"


def html_text(text: str) -> str:
    """Text as HTML that shows just that."""
    return html.escape(_shown(text), quote=True)


def markdown_text(text: str) -> str:
    """Text as Markdown that shows just that, also in a cell of a table."""
    return _MARKUP.sub(lambda match: f"\\{match[0]}", _shown(text))


def _shown(text: str) -> str:
    text = visible_line(text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html_text(block.text)}</h2>"
    if isinstance(block, Paragraph):
        return f"<p>{html_text(block.text)}</p>"
    if isinstance(block, Command):
        return f"<pre>{html.escape(visible_line(block.text))}</pre>"
    if isinstance(block, Plot):
        words = html_text(block.words)
        image = f'<img src="{_data(block.svg, "svg+xml")}" alt="{words}">'
        return f"<figure>{image}<figcaption>{words}</figcaption></figure>"
    numbers = [name.startswith("#") for name in block.columns]
    lines = ['<div class="wide"><table>']
    names = [name.removeprefix("#") for name in block.columns]
    if any(names):
        head = zip(names, numbers, strict=True)
        cells = "".join(f"<th{_class(number)}>{html_text(name)}</th>" for name, number in head)
        lines.append(f"<thead><tr>{cells}</tr></thead>")
    lines.append("<tbody>")
    for row in block.rows:
        pairs = zip(row, numbers, strict=True)
        cells = "".join(f"<td{_class(number)}>{_html_cell(cell)}</td>" for cell, number in pairs)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, Picture):
        return f'<img src="{_data(cell.content, cell.kind)}" alt="{html_text(cell.words)}">'
    return html_text(cell) if isinstance(cell, str) else "<br>".join(map(html_text, cell))


def _class(number: bool) -> str:
    return ' class="number"' if number else ""


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _markdown_block(block: Block, stem: str) -> str:
    if isinstance(block, Heading):
        return f"## {markdown_text(block.text)}"
    if isinstance(block, Paragraph):
        return markdown_text(block.text)
    if isinstance(block, Command):
        return f"    {visible_line(block.text)}"  # one indented line, out of which nothing leads
    if isinstance(block, Plot):
        return f"![{markdown_text(block.words)}]({quote(plot_file(stem, block), safe='')})"
    kept = [
        place
        for place in range(len(block.columns))
        if not any(isinstance(row[place], Picture) for row in block.rows)
    ]
    names = [block.columns[place] for place in kept]
    lines = [
        [markdown_text(name.removeprefix("#")) for name in names],
        ["---:" if name.startswith("#") else "---" for name in names],
        *([_markdown_cell(row[place]) for place in kept] for row in block.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, Picture):
        return markdown_text(cell.words)
    return markdown_text(cell) if isinstance(cell, str) else "<br>".join(map(markdown_text, cell))


_STYLE = """
:root { color-scheme: light dark; --ground: #f5f6f8; --surface: #fff; --text: #1a1d23;
  --muted: #636b7a; --line: #dfe2e8; }
@media (prefers-color-scheme: dark) { :root { --ground: #111318; --surface: #191c23;
  --text: #e7e9ee; --muted: #98a0b0; --line: #2c313c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 32px 0 8px; }
p { margin: 8px 0; max-width: 80ch; overflow-wrap: anywhere; }
pre { background: var(--surface); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
.wide { overflow-x: auto; background: var(--surface); border: 1px solid var(--line);
  border-radius: 8px; margin: 8px 0; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; }
th, td { padding: 6px 12px; text-align: left; vertical-align: top; overflow-wrap: break-word; }
td { max-width: 560px; }
th { font-weight: 600; color: var(--muted); white-space: nowrap; }
thead + tbody tr, tr + tr { border-top: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td img { display: block; width: 96px; height: auto; border-radius: 4px; }
figure { margin: 12px 0; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 12px; color: #333; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: 12px; color: #555; margin-top: 4px; }
"""
