"""docs/generators.md is tried, not only read."""

import re
from pathlib import Path

import prompt_generators
from prompt_generators import make_generator, resolve_generator
from prompt_generators.profiles import RESERVED_COLUMNS

DOCS = (Path(__file__).parents[2] / "docs" / "generators.md").read_text(encoding="utf-8")


def test_the_generator_shown_works_and_is_as_short_as_promised(tmp_path, monkeypatch):
    module, test = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    code_lines = [line for line in module.splitlines() if line.strip()]
    assert len(code_lines) <= 20
    (tmp_path / "cars.py").write_text(module)
    monkeypatch.setattr(prompt_generators, "__path__", [*prompt_generators.__path__, str(tmp_path)])
    line = re.search(r'"(cars)": "([\w.]+:\w+)"', DOCS)
    monkeypatch.setitem(prompt_generators.GENERATORS, line[1], line[2])
    names = {"make_generator": make_generator}
    exec(test, names)
    names["test_cars"]()


def test_the_table_lists_every_known_column():
    shown = set(re.findall(r"`(\w+)`", DOCS))
    for name in ("avatars", "food", "gaming"):
        assert set(resolve_generator(name).columns) <= shown
    assert set(RESERVED_COLUMNS) <= shown
