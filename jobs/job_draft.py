"""A commented job file for a table.

The table, its name and its columns are anybody's: whatever they say is written as a YAML scalar
that reads back as it was, or, in a comment, with everything that acts written out.
"""

from __future__ import annotations

import os
import re
import shlex
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.errors import InputError
from jobs.proposal import Proposal
from jobs.quantities import counted
from jobs.terminal import visible_line
from jobs.yaml_file import YamlFileError, display, read_value
from prompt_generators import Profiles

_WIDTH = 98  # of comments
_LONGEST = 60  # characters of a name in a comment
_SHOWN = 40  # names
# What reads the same without quotes wherever it stands.
_PLAIN = re.compile(r"[A-Za-z./][A-Za-z0-9._/-]*(?: [A-Za-z0-9._/-]+)*", re.ASCII)
_SINGLE_LINE = float("inf")


@dataclass(frozen=True)
class JobDraft:
    """What a job file is to say.

    Attributes:
        path: of the file.
        name: of the job.
        profiles: the table.
        sheet: to be named in the file; None for CSV and workbooks of one sheet.
        proposal: the generator.
        preset: that the file extends.
        model: the checkpoint's folder; None for the preset's own.
        output: `output.uri`.
    """

    path: Path
    name: str
    profiles: Profiles
    sheet: str | None
    proposal: Proposal
    preset: str
    model: Path | None
    output: str

    def content(self) -> dict[str, Any]:
        """The file's keys and values."""
        prompts: dict[str, Any] = {
            "generator": self.proposal.generator,
            "profiles": relative_path(self.profiles.path, self.path.parent),
        }
        if self.sheet is not None:
            prompts["sheet"] = self.sheet
        prompts["count"] = len(self.profiles)
        if self.proposal.options:
            prompts["options"] = self.proposal.options
        content: dict[str, Any] = {"extends": self.preset, "name": self.name}
        if self.model is not None:
            content["model"] = {"path": relative_path(self.model, self.path.parent), "repo": None}
        content |= {
            "prompts": prompts,
            "sampling": {"seed": 42},
            "output": {"uri": self.output},
        }
        return content

    def text(self) -> str:
        """The file's text.

        Raises:
            InputError: a name in it cannot be written so that it reads back as it is.
        """
        content = self.content()
        lines = [f"# {line}" if line else "#" for line in self._head()]
        for key, value in content.items():
            if isinstance(value, dict):
                lines += ["", f"{key}:", *self._section(key, value)]
            else:
                lines.append(f"{key}: {scalar(value)}{self._remark(key)}")
        text = "\n".join(lines) + "\n"
        try:
            same = read_value(text) == content
        except YamlFileError:
            same = False
        if not same:
            raise InputError(
                f"{display(self.profiles.path)}: a name of its file, sheet or columns cannot be "
                "written into a job file; allowed: names that are text"
            )
        return text

    def _section(self, section: str, values: dict[str, Any]) -> list[str]:
        lines = []
        for key, value in values.items():
            if isinstance(value, dict):
                lines.append(f"  {key}:")
                for option, inner in value.items():
                    lines += [f"    # {line}" for line in self._about(option)]
                    lines.append(f"    {option}: {scalar(inner)}")
            else:
                lines += [f"  # {line}" for line in self._about(f"{section}.{key}")]
                lines.append(f"  {key}: {scalar(value)}{self._remark(f'{section}.{key}')}")
        return lines

    def _head(self) -> list[str]:
        job = comment_text(shlex.quote(display(self.path)), longest=200)
        rows = counted(len(self.profiles), "row")
        table = comment_text(self.profiles.path.name)
        return [
            f"{counted(len(self.profiles), 'prompt')} from the {rows} of {table}, as drafted by",
            "`zimage init`. Yours to edit; every key: docs/job-file.md",
            "",
            f"  zimage plan {job}    # checks everything, makes nothing",
            f"  zimage run {job} --local --limit 8    # eight images on this machine",
            f"  zimage run {job}    # all of them, on every GPU of this machine",
            "",
        ]

    def _about(self, key: str) -> list[str]:
        """Lines of comment above a key."""
        proposal = self.proposal
        if key == "prompts.generator" and proposal.generator in ("avatars", "food", "gaming"):
            return [
                *_wrapped("Words of the prompt", [comment_text(name) for name in proposal.used]),
                *_wrapped("Not in it", _reasons(proposal)),
                "What an empty cell or a missing column leaves open is drawn anew for each prompt.",
            ]
        if key == "template":
            return [
                "Columns stand in braces; literal braces are doubled.",
                *_wrapped("Left out", _reasons(proposal)),
            ]
        if key == "missing":
            return ["What an empty cell reads as; without this key it is an error."]
        return []

    def _remark(self, key: str) -> str:
        """A comment at the end of a key's line, or nothing."""
        remarks = {
            "extends": f"model and sampling, from configs/{self.preset}.yaml",
            "name": f"images are called {self.name}_00000000.png and so on",
            "model.path": "relative to this file",
            "model.repo": "nothing is fetched",
            "prompts.profiles": "relative to this file",
            "prompts.count": "the rows of the table",
            "sampling.seed": "image number i is made with seed 42 + i",
            "output.uri": "relative to where the command runs; or s3://, gs://, az://",
        }
        if self.proposal.generator in ("avatars", "food", "gaming"):
            remarks["prompts.count"] += "; more go through them again, otherwise drawn"
        return f" # {remarks[key]}" if key in remarks else ""


def job_name(stem: str) -> str:
    """A job's name from a file's, of the letters that a job's name may have."""
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")
    return plain[:64] or "job"


def scalar(value: object) -> str:
    """A text, number, boolean or null as it is written in YAML on one line."""
    if not isinstance(value, str):
        return str(yaml.safe_dump(value)).splitlines()[0]
    if _PLAIN.fullmatch(value) and _is_text(value):
        return value
    written = yaml.safe_dump(
        value,
        default_style='"',
        width=_SINGLE_LINE,
        # letters of any script as they are; what acts on a reader's screen escaped
        allow_unicode=value.isprintable(),
    )
    return str(written).rstrip("\n")


def comment_text(text: str, *, longest: int = _LONGEST) -> str:
    """Anybody's text for a comment: on one line, printable, cut."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in visible_line(text)
    )
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


def relative_path(target: Path, folder: Path) -> str:
    """A path as a file in `folder` names it: relative, where that leads to the same place."""
    relative = os.path.relpath(target, folder)
    # `..` behind a link leads to where the link points; a `~` at the start is someone's home
    same = os.path.realpath(folder / relative) == os.path.realpath(target)
    return relative if same and not relative.startswith("~") else os.path.abspath(target)  # noqa: PTH100 - without links followed


def _is_text(value: str) -> bool:
    return isinstance(read_value(value), str)


def _reasons(proposal: Proposal) -> list[str]:
    return [
        f"{', '.join(map(comment_text, names[:_SHOWN]))}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        + f" ({why})"
        for why, names in proposal.reasons().items()
    ]


def _wrapped(label: str, items: Sequence[str]) -> list[str]:
    """Lines of comment; `items` are safe to write."""
    if not items:
        return []
    text = f"{label}: {', '.join(items)}."
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
