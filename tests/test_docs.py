"""What the documents say can be followed: links lead somewhere, commands parse, names exist."""

import json
import re
import shlex
from pathlib import Path

import pytest

from jobs.cli import parser
from jobs.command_help import commands
from jobs.commits import PartName
from jobs.errors import ERROR_TYPES
from jobs.manifest import COLUMN_NAMES

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "data/*.md", "docs/**/*.md")
    for page in ROOT.glob(pattern)
    if page.is_file()
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"\[[-a-z]|\bJOB\b|\bOUTPUT\b|\bURI\b")  # a synopsis, not a command


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell_lines(page: Path) -> list[str]:
    """Lines of shell blocks and indented commands, continued ones joined, comments cut off."""
    text = text_of(page).replace("\\\n", " ")
    blocks = [body for language, body in FENCE.findall(text) if language == "sh"]
    indented = re.findall(r"^    (zimage .*)$", FENCE.sub("", text), re.MULTILINE)
    lines = "\n".join(blocks).splitlines() + indented
    commands = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [command for command in commands if command]


def zimage_arguments(page: Path) -> list[list[str]]:
    """Arguments of every `zimage` that a page tells to type, by itself or through Ray."""
    found = []
    for line in shell_lines(page):
        words = shlex.split(line)
        if "zimage" in words and not PLACEHOLDER.search(line):
            found.append(words[words.index("zimage") + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


PAGES_WITH_COMMANDS = [str(page.relative_to(ROOT)) for page in PAGES if zimage_arguments(page)]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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


# what looks at an output, or needs none, and ends by itself
_SAFE = {"plan", "status", "verify", "diff", "gc", "export", "gallery", "report", "bench", "doctor"}
_SAFE |= {"generate"}
_NEEDS_MORE = re.compile(
    r"s3://|ckpts/|--serve|--import-rejected|--init-image|--redo|mine\.yaml|people|--model DIR"
)


@pytest.mark.slow
def test_commands_of_all_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tiny checkpoint and an output are all that they need."""
    from jobs.cli import main

    for name in ("data", "jobs", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    tiny = ["--local", "--config", "configs/z-image-tiny.yaml", "--count", "4"]
    assert main(["run", "jobs/avatars.yaml", *tiny]) == 0
    ran, failed = set(), []
    for name in PAGES_WITH_COMMANDS:
        for arguments in zimage_arguments(ROOT / name):
            line = shlex.join(arguments)
            if arguments[0] in _SAFE and not _NEEDS_MORE.search(line):
                arguments = [re.sub("^/tmp/", f"{tmp_path}/", word) for word in arguments]
                # attempts have names of their own in every run
                arguments = [
                    path
                    for word in arguments
                    for path in (map(str, Path().glob(word)) if "*" in word else [word])
                ]
                # of the published size, not what the output here was made at
                arguments += ["--output", "planned"] if arguments[0] == "plan" else []
                ran.add(arguments[0])
                if main(arguments) != 0:
                    failed.append(f"{name}: zimage {line}")
    assert not failed
    assert ran >= _SAFE - {"bench"}


@pytest.mark.slow
def test_first_job_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.cli import main

    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    commands = zimage_arguments(ROOT / "docs/first-job.md")
    assert {arguments[0] for arguments in commands} >= {"init", "plan", "run", "gallery", "report"}
    for arguments in commands:
        assert main(arguments) == 0, arguments
    assert (tmp_path / "output/avatars/report.html").is_file()


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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
