"""The documents as a site: it builds strictly, has every page, loads nothing from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("material", reason="needs mkdocs-material: pip install 'zimage-batch[docs]'")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


class Loaded(HTMLParser):
    """What a browser fetches for a page, and where the page leads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.led_to: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "src" or (tag == "link" and name == "href"):
                self.fetched.append(value or "")
            elif tag == "a" and name == "href":
                self.led_to.append(value or "")


def build_site(folder: Path, **changes: object) -> Path:
    """The site of `.mkdocs.yml`, with --strict.

    Raises:
        Abort: there were warnings.
    """
    config = load_config(str(ROOT / ".mkdocs.yml"), strict=True, site_dir=str(folder), **changes)
    build(config)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"))


def test_every_page_is_in_the_nav(site: Path) -> None:
    led_to = Loaded((site / "index.html").read_text("utf-8")).led_to
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix(".html").as_posix()
        assert name.replace("README", "index") in led_to, page
    for name in ("changes.html", "contributing.html", "security.html", "data.html"):
        assert name in led_to


def test_no_page_loads_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        for address in Loaded(page.read_text("utf-8")).fetched:
            assert not re.match(r"(?:[a-z]+:)?//", address), f"{page}: {address}"
            if page.name != "404.html":  # whose links are from the root
                assert (page.parent / address.partition("?")[0]).exists(), f"{page}: {address}"
    # the theme would fetch what draws these
    assert not any("```mermaid" in page.read_text("utf-8") for page in DOCS.rglob("*.md"))
    styles = "".join(sheet.read_text("utf-8") for sheet in site.rglob("*.css"))
    assert "fonts.googleapis.com" not in styles and "@import" not in styles


def test_links_that_leave_the_documents_lead_to_pages_or_become_words(site: Path) -> None:
    front = Loaded((site / "index.html").read_text("utf-8")).led_to
    assert {"first-job.html", "output.html", "contributing.html"} <= set(front)
    assert not [link for link in front if link.endswith(".md") or "LICENSE" in link]
    assert "data.html" in Loaded((site / "weights.html").read_text("utf-8")).led_to
    changes = Loaded((site / "changes.html").read_text("utf-8")).led_to
    assert {"cli.html#bench", "benchmarks/index.html"} <= set(changes)


BAD = {
    "[gone](gone.md)": "leads to no file",
    "[gone](#nowhere)": "#nowhere",
    "[gone](../README.md#gone)": "#gone",
    "[plain](http://example.org/)": "is not of the form",
    "[half](https://example)": "is not of the form",
}


def test_bad_links_end_the_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "data/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# A page\n")
    docs = tmp_path / "docs"
    docs.mkdir()
    well = "# One\n\n[the same](#one) [another](../README.md#a-page) [out](https://example.org/a)\n"
    (docs / "one.md").write_text(well)
    brought = ["index.md", "changes.md", "contributing.md", "security.md", "data.md"]
    changes = {
        "docs_dir": str(docs),
        "theme": {"name": "mkdocs", "highlightjs": False},
        "plugins": [],
    }
    build_site(tmp_path / "site", nav=[{"All": ["*.md", *brought]}], **changes)
    (docs / "one.md").write_text(well + "\n".join(BAD))
    with pytest.raises(Abort, match=f"{len(BAD)} warnings"):
        build_site(tmp_path / "site", nav=[{"All": ["*.md", *brought]}], **changes)
    for problem in BAD.values():
        assert problem in caplog.text
    (docs / "forgotten.md").write_text(well)
    (docs / "one.md").write_text(well)
    with pytest.raises(Abort):
        build_site(tmp_path / "site", nav=[{"All": ["one.md", *brought]}], **changes)
    assert "forgotten.md" in caplog.text
