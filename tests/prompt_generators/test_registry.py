import subprocess
import sys

import pytest

from prompt_generators import (
    GENERATORS,
    ProfileError,
    generator_source,
    make_generator,
    prompt_at,
    resolve_generator,
)

CUSTOM = """
import json
class Plain:
    def __init__(self, word="x", *, times=1):
        self.word, self.times = word, times
    def generate_prompt(self, index):
        return f"{self.word * self.times} {index}"
class WithTable(Plain):
    def __init__(self, *, profiles=None, word):
        super().__init__(word)
        self.profiles = profiles
class Open(Plain):
    def __init__(self, **anything):
        self.anything = anything
class Failing(Plain):
    def __init__(self):
        raise KeyError("age")
class NoMethod:
    pass
instance = Plain()
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    (tmp_path / "team_prompts").mkdir()
    (tmp_path / "team_prompts" / "__init__.py").write_text("from team_prompts.own import Plain\n")
    (tmp_path / "team_prompts" / "own.py").write_text(CUSTOM)
    (tmp_path / "team_prompts" / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "team_prompts"
    for name in [name for name in sys.modules if name.startswith("team_prompts")]:
        del sys.modules[name]


def test_built_in_names_resolve():
    assert sorted(GENERATORS) == ["avatars", "food", "gaming", "table", "template"]
    for name in GENERATORS:
        assert callable(resolve_generator(name).generate_prompt)


def test_custom_class_gets_what_it_takes(custom):
    plain = make_generator("team_prompts.own:Plain", options={"word": "ab", "times": 2})
    assert prompt_at(plain, 3).text == "abab 3"
    table = make_generator("team_prompts.own:WithTable", profiles="t.csv", options={"word": "w"})
    assert table.profiles == "t.csv"
    anything = make_generator("team_prompts.own:Open", profiles="t.csv", options={"a": 1}).anything
    assert anything == {"profiles": "t.csv", "sheet": None, "a": 1}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("avatar", {}, "no generator 'avatar' .*allowed: avatars, food, gaming, table, template"),
        ("a.b:", {}, "no generator"),
        ("os;x:y", {}, "no generator"),
        (None, {}, "no generator None"),
        ("no_such_package.x:Y", {}, "importing 'no_such_package.x' failed with ModuleNotFound"),
        ("team_prompts.broken:X", {}, "failed with ZeroDivisionError"),
        ("team_prompts.own:Missing", {}, "module 'team_prompts.own' has no 'Missing'"),
        ("team_prompts.own:NoMethod", {}, "not a class with a method generate_prompt"),
        ("team_prompts.own:instance", {}, "not a class with a method generate_prompt"),
        ("team_prompts.own:json", {}, "not a class with a method generate_prompt"),
        ("team_prompts.own:Failing", {}, "its constructor raised KeyError: 'age'"),
        ("team_prompts.own:Plain", {"profiles": "t.csv"}, "takes no profiles, got 't.csv'"),
        ("team_prompts.own:WithTable", {"sheet": "s"}, "takes no sheet, got 's'"),
        ("team_prompts.own:Plain", {"options": {"wrd": 1}}, "option 'wrd' .*allowed: times, word"),
        ("team_prompts.own:Plain", {"options": {3: 1}}, "has no option 3"),
        ("team_prompts.own:Failing", {"options": {"a": 1}}, r"has no option 'a' \(allowed: none\)"),
        ("team_prompts.own:WithTable", {}, "needs the option 'word'"),
        ("team_prompts.own:Open", {"options": {"sheet": "x"}}, "has no option 'sheet'"),
        ("avatars", {"options": {"sed": 1}}, r"no option 'sed' \(allowed: include_name, seed\)"),
        ("food", {"options": {"profiles": "x"}}, "has no option 'profiles'"),
        ("gaming", {"sheet": "s"}, "sheet 's' is given, but no profile table"),
    ],
)
def test_errors_say_what_is_allowed(custom, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_generator(name, **arguments)


def test_profile_errors_pass_unchanged(tmp_path):
    with pytest.raises(ProfileError, match=r"^.*no\.csv: no such file$"):
        make_generator("avatars", profiles=tmp_path / "no.csv")


def test_source_is_all_that_defines_a_generator(custom):
    names = sorted(path.name for path in generator_source("avatars"))
    assert names == [
        *("avatars.json", "avatars.py", "base.py", "composer.py", "profiles.py"),
        *("spreadsheet.py", "vocabulary.py"),
    ]
    assert all(path.is_file() for name in GENERATORS for path in generator_source(name))
    assert "table.py" in [path.name for path in generator_source("table")]
    assert generator_source("team_prompts:Plain") == [custom / "__init__.py", custom / "own.py"]


def test_importing_the_package_is_cheap():
    code = (
        "import sys, prompt_generators as p; p.make_generator('avatars').generate_prompt(0)\n"
        "heavy = {'pandas', 'numpy', 'openpyxl', 'torch', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
