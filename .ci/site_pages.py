"""Build hook of the site: brings pages that lie outside of docs/, and holds links to their form.

mkdocs itself checks every link and anchor inside of the site. A link to what is not part of it
(a licence, a source file) works in a clone; in the site its words stay, without the link.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

log = logging.getLogger("mkdocs.hooks.site_pages")  # below mkdocs, so that --strict counts it

BROUGHT = {  # a file of the repository: the page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "data/README.md": "data.md",
}
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
EXTERNAL = re.compile(r"https://[a-z0-9.-]+\.[a-z]+(?:/[^\s<>\"]*)?")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the files in the place of a pattern in the nav, and name headings as GitHub does."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    docs = Path(config.docs_dir)
    for section in config.nav or []:
        for title, entries in section.items():
            if isinstance(entries, list):
                section[title] = [page for entry in entries for page in _pages(docs, entry)]
    return config


def _pages(docs: Path, entry: Any) -> list[Any]:
    if not isinstance(entry, str) or "*" not in entry:
        return [entry]
    return sorted(path.relative_to(docs).as_posix() for path in docs.glob(entry))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of `BROUGHT`."""
    root = Path(config.docs_dir).parent
    for source, page in BROUGHT.items():
        text = (root / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page, relative to its file in the repository, into links of the site."""
    pages = {page_name: source for source, page_name in BROUGHT.items()}
    here = pages.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        mark, words, link = match.groups()
        if ":" in link:
            if not EXTERNAL.fullmatch(link):
                log.warning("%s: link %r is not of the form https://HOST/PATH", here, link)
            return match[0]
        path, hash_, anchor = link.partition("#")
        if not path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        file = Path(config.docs_dir).parent / target
        if not file.exists():
            log.warning("%s: link %r leads to no file", here, link)
        if file.is_dir():
            target += "/README.md"
        inside = BROUGHT.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(inside) is None or inside == target:
            return words
        relative = posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{words}]({relative}{hash_}{anchor})"

    pieces = FENCED.split(markdown)
    return "".join(
        piece if index % 2 else LINK.sub(rewrite, piece) for index, piece in enumerate(pieces)
    )
