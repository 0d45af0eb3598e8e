"""`--help` of every command: one voice, a screen, an example that parses; completion in a shell."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import shtab

from jobs.cli import parser
from jobs.command_help import EXAMPLES, commands

COMMANDS = {command.prog: command for command in commands(parser())}
SCREEN = 24
# more commands, or more flags, than a screen has lines
LONGER = {"zimage": 30, "zimage submit": 26, "zimage generate": 50}
CLI_PAGE = Path(__file__).parents[2] / "docs/cli.md"


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_every_command_is_walked() -> None:
    assert {"zimage", "zimage run", "zimage weights convert", "zimage doctor"} <= set(COMMANDS)
    assert set(COMMANDS) == set(EXAMPLES)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_a_screen_with_an_example(name: str) -> None:
    lines = COMMANDS[name].format_help().splitlines()
    assert len(lines) <= LONGER.get(name, SCREEN), "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: {name}") and lines[1] == ""
    *_, blank, example = lines
    assert blank == "" and example.startswith(f"example: {name} ")
    parser().parse_args(shlex.split(example)[2:])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_says_what_it_is_in_one_voice(name: str) -> None:
    for action in COMMANDS[name]._actions:
        if isinstance(action, argparse._SubParsersAction | argparse._VersionAction):
            continue
        text = action.help or ""
        assert text, f"{name}: {action.dest} has no help"
        assert not text.endswith("."), f"{name}: {action.dest}: {text}"
        # lower case, but for names and placeholders
        first = text.split()[0]
        assert first[0].islower() or not first[0].isalpha() or first.isupper(), f"{name}: {text}"


def test_summaries_are_what_the_page_says_in_the_third_person() -> None:
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(#\w+\) \| ([\w-]+)", CLI_PAGE.read_text("utf-8"), re.MULTILINE
    )
    verbs = dict(rows)
    assert len(verbs) == sum(name.count(" ") == 1 for name in COMMANDS)
    for name, command in COMMANDS.items():
        assert command.description, name
        first = command.description.split()[0].strip(",").lower()
        assert command.description[0].isupper() or name == "zimage"
        if name.count(" ") == 1:
            assert verbs[name.split()[1]] in (f"{first}s", f"{first}es"), name


def test_an_error_comes_after_one_line_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["generate", "--model", "m", "--steps", "none"])
    assert ended.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: zimage generate [options]"
    assert error.startswith("zimage generate: error: argument --steps: value 'none'")


def complete_in_bash(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words after `zimage`."""
    script = shtab.complete(parser(), "bash")
    script += f"""
COMP_WORDS=(zimage {shlex.join(words)}); COMP_CWORD={len(words)}
$(complete -p zimage | sed 's/.*-F \\([^ ]*\\).*/\\1/') 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    (folder / "complete.sh").write_text(script)
    ended = subprocess.run(
        ["bash", "--norc", "complete.sh"], cwd=folder, capture_output=True, text=True, check=True
    )
    return sorted(ended.stdout.split())


def test_bash_completes_commands_flags_and_files(tmp_path: Path) -> None:
    (tmp_path / "people.yaml").touch()
    assert complete_in_bash(tmp_path, "re") == ["regen", "report"]
    assert complete_in_bash(tmp_path, "weights", "co") == ["convert"]
    assert complete_in_bash(tmp_path, "run", "--acc") == ["--accept-changes"]
    assert complete_in_bash(tmp_path, "run", "peo") == ["people.yaml"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_commands_of_the_page_write_a_completion(shell: str) -> None:
    (line,) = re.findall(
        rf"^(shtab --shell={shell} .*?) > ", CLI_PAGE.read_text("utf-8"), re.MULTILINE
    )
    ended = subprocess.run(
        [sys.executable, "-m", *line.split()], capture_output=True, text=True, check=True
    )
    assert "--accept-changes" in ended.stdout and "zimage" in ended.stdout
