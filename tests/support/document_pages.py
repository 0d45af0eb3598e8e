"""The project's pages, and the lines that they tell to type into a shell."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "data/*.md", "docs/**/*.md")
    for page in ROOT.glob(pattern)
    if page.is_file()
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_CODE = re.compile(FENCE.pattern + r"|((?:^    zimage [^\n]*\n)+)", re.DOTALL | re.MULTILINE)
_SYNOPSIS = re.compile(r"\[[-a-z]|\bJOB\b|\bOUTPUT\b|\bURI\b")  # a form, not a command


def text_of(page: Path) -> str:
    """What the file holds."""
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    """Path of a page below the project, as it is cited."""
    return page.relative_to(ROOT).as_posix()


def shell_blocks(page: Path) -> list[list[str]]:
    """Lines of each shell block and each run of indented commands, as a shell would read them.

    Continued lines are joined, comments and forms (`zimage run JOB [--local]`) left out.
    """
    blocks = []
    for language, fenced, indented in _CODE.findall(text_of(page).replace("\\\n", " ")):
        lines = [
            line.strip()
            for line in (fenced if language == "sh" else indented).splitlines()
            if shlex.split(line, comments=True) and not _SYNOPSIS.search(line.partition(" #")[0])
        ]
        if lines:
            blocks.append(lines)
    return blocks


def shell_lines(page: Path) -> list[str]:
    """All of them, without their comments."""
    lines = [line for block in shell_blocks(page) for line in block]
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


def zimage_arguments(page: Path) -> list[list[str]]:
    """Arguments of every `zimage` that a page tells to type, by itself or through Ray."""
    found = []
    for line in shell_lines(page):
        words = shlex.split(line)
        if "zimage" in words:
            found.append(words[words.index("zimage") + 1 :])
    return found
