"""What the documents say can be followed: links lead somewhere, commands parse, names exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
from document_pages import FENCE, PAGES, ROOT, name_of, shell_lines, text_of, zimage_arguments

from jobs.cli import parser
from jobs.command_help import commands
from jobs.commits import PartName
from jobs.errors import ERROR_TYPES
from jobs.manifest import COLUMN_NAMES

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


PAGES_WITH_COMMANDS = [name_of(page) for page in PAGES if zimage_arguments(page)]


@pytest.mark.parametrize("name", PAGES_WITH_COMMANDS)
def test_commands_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in zimage_arguments(ROOT / name):
        try:
            parsed = parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"zimage {shlex.join(arguments)}: {capsys.readouterr().err}")
        for file in [getattr(parsed, "job", None), *getattr(parsed, "config", [])]:
            # a job of the reader's own is written down beside the command
            assert file is None or (ROOT / file).is_file() or str(file) in text_of(ROOT / name)


def test_pages_that_show_commands_are_found() -> None:
    pages = {
        "README.md",
        *(f"docs/{name}.md" for name in ("cli", "cluster", "first-job", "weights")),
    }
    assert pages <= set(PAGES_WITH_COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_within_a_sentence_exist_with_their_flags(page: Path) -> None:
    """And so do those of a synopsis, which no parser takes."""
    known = {command.prog: command for command in commands(parser())}
    text = FENCE.sub("", text_of(page))
    synopses = re.findall(r"^    (zimage .*(?:\n {8,}.*)*)$", text, re.MULTILINE)
    for line in re.findall(r"`(zimage\s[^`]+)`", text) + synopses:
        name = "zimage"
        for word in re.findall(r"[\w-]+", line.partition(" -")[0])[1:]:
            name = f"{name} {word}" if f"{name} {word}" in known else name
        assert name != "zimage" or "COMMAND" in line or "--version" in line, line
        flags = {flag for action in known[name]._actions for flag in action.option_strings}
        if "|" in line.partition("[")[0]:  # several verbs in one
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z-]+", line.partition(" -- ")[0]):
            assert flag in flags, f"{line}: {flag}"


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"`make ([a-z-]+)`", text_of(page)))
        named |= {line.split()[1] for line in shell_lines(page) if line.startswith("make ")}
    assert {"demo", "test", "docs", "check"} <= named <= targets


def test_readme_shows_every_command_that_makes_or_checks_a_job() -> None:
    shown = {arguments[0] for arguments in zimage_arguments(ROOT / "README.md")}
    assert {"run", "submit", "plan", "status", "verify", "doctor"} <= shown


def test_files_of_ray_submit_exist() -> None:
    for name in ("README.md", "docs/cluster.md"):
        lines = [line for line in shell_lines(ROOT / name) if line.startswith("ray submit")]
        assert lines, name
        for line in lines:
            words = [word for word in shlex.split(line)[2:] if not word.startswith("--")]
            assert (ROOT / words[0]).is_file(), line
            assert (ROOT / words[1]).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_in_text_exist(page: Path) -> None:
    pattern = (
        r"\b(?:configs|jobs|tests|docs|zimage_core|prompt_generators)/[\w./-]+\.(?:yaml|py|md)\b"
    )
    made_by_the_reader = {"prompt_generators/cars.py", "jobs/a.yaml"}
    for name in set(re.findall(pattern, text_of(page))) - made_by_the_reader:
        if "NAME" not in name:
            assert (ROOT / name).is_file(), name


def test_every_command_and_flag_is_described() -> None:
    text = text_of(ROOT / "docs" / "cli.md")
    subparsers = next(action for action in parser()._actions if action.dest == "command")
    for name, command in dict(subparsers.choices).items():
        assert f"\n## {name}\n" in text
        for action in command._actions:
            for flag in action.option_strings[-1:]:
                assert f"`{flag}" in text or flag in text or flag == "--help", f"{name} {flag}"


def test_every_column_error_type_and_part_name_is_described() -> None:
    text = text_of(ROOT / "docs" / "output.md")
    table = text.split("## Columns", 1)[1].split("\n## ", 1)[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    names = [name.rstrip("?") for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]
    assert names == [*COLUMN_NAMES, "profile_<column>"]
    for error_type in ERROR_TYPES:
        assert f"`{error_type}`" in text
    for part in re.findall(r"\S+\.parquet", text):
        if "-r0" in part:
            PartName.parse(part.rpartition("/")[2])


def test_documents_are_plain() -> None:
    """No emoji, no badges, no paths of the machine they were written on."""
    for page in PAGES:
        text = text_of(page)
        assert not re.search("[\U0001f000-\U0001faff\u2600-\u27bf]", text), page
        assert "shields.io" not in text, page
        assert not re.search(r"/(?:work|root)/", text), page


def test_readme_is_at_most_two_screens_and_a_bit() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 180


def test_plan_status_verify_doctor_keys_are_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.cli import main

    monkeypatch.chdir(tmp_path)
    job = ["jobs/avatars.yaml", "--config", "configs/z-image-tiny.yaml", "--count", "2"]
    small = ["--set", "sampling={width: 64, height: 64, num_inference_steps: 1}"]
    assert main(["run", *job, *small, "--output", "out", "--local"]) == 0
    plan = ["plan", *job, *small, "--output", "out", "--device", "h100", "--json"]
    text = text_of(ROOT / "docs" / "cli.md")
    for arguments in (
        plan,
        ["status", "out", "--json"],
        ["verify", "out", "--json"],
        ["regen", "out", "0", "--json"],
        ["gc", "out", "--json"],
        ["diff", "jobs/avatars.yaml", "jobs/food.yaml", "--json"],
        ["doctor", "--json"],
    ):
        capsys.readouterr()
        main(arguments)
        report = json.loads(capsys.readouterr().out)
        section = text.split(f"\n## {arguments[0]}\n", 1)[1].split("\n## ", 1)[0]
        first_cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
        described = [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]
        assert [key for key in described if key in report] == list(report), arguments[0]
        for key in ("driver", "shards", "time", "disk", "model", "cpu", "orphans", "young"):
            for inner in report[key] if isinstance(report.get(key), dict) else ():
                assert f"`{inner}`" in section, f"{key}.{inner}"
        for sample in report["samples"] if isinstance(report.get("samples"), list) else ():
            for inner in sample:
                assert f"`{inner}`" in section, f"samples.{inner}"
