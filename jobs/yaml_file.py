"""Reading one YAML file strictly: whatever is wrong with it ends in one message with its place.

`yaml.safe_load` with four things it lacks: a key given twice is an error instead of the last one
winning, a value that its tag cannot hold is an error with line and column instead of a traceback,
aliases cannot grow a small file into gigabytes, and the file's size is limited.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000  # after aliases are written out
_MAX_DEPTH = 100  # mappings and lists within each other
_MAX_BITS = 256  # of a whole number; any key takes fewer, and thousands of digits cannot be shown
_LONGEST = 80  # characters of what a message quotes


class YamlFileError(ValueError):
    """A file that cannot be read as a YAML mapping; the message names it and the place."""


def display(path: Path) -> str:
    """Return the path as messages show it: relative where it is below the working directory."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - unlike Path.absolute() this drops ".."
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping with text keys, at every depth.

    Raises `YamlFileError` for anything else: missing, a folder, not UTF-8, over 1 MB, bad syntax
    (with line and column), keys given twice, more than one document, empty, not a mapping.
    """
    text = _read_text(path)
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        context = f" ({_cut(error.context, 4)})" if error.context else ""
        raise YamlFileError(f"{display(path)}: {place}{_cut(error.problem, 4)}{context}") from None
    except yaml.reader.ReaderError as error:
        line, column = _place(text[: error.position])
        raise YamlFileError(
            f"{display(path)}: line {line}, column {column}: character "
            f"U+{ord(text[error.position]):04X} is not allowed in YAML"
        ) from None
    except RecursionError:
        raise YamlFileError(f"{display(path)}: nested too deeply") from None
    if data is None:
        raise YamlFileError(f"{display(path)}: empty; it must hold a mapping (KEY: VALUE)")
    if not isinstance(data, dict):
        raise YamlFileError(f"{display(path)}: {kind(data)}, where a mapping (KEY: VALUE) belongs")
    check_keys(data, display(path))
    return data


def read_value(text: str) -> object:
    """Read a value as `--set` gives it. Raises `YamlFileError` with the place in the text."""
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"column {mark.column + 1}: " if mark else ""
        raise YamlFileError(f"not YAML: {place}{_cut(error.problem, 4)}") from None
    except yaml.reader.ReaderError:
        raise YamlFileError("not YAML: a character that YAML does not allow") from None
    except RecursionError:
        raise YamlFileError("not YAML: nested too deeply") from None
    check_keys(value, "the value")
    return value


def kind(value: object) -> str:
    """Return what YAML made of a value, in words a user of YAML knows."""
    names = {bool: "a boolean", int: "a whole number", float: "a number", str: "text"}
    names |= {dict: "a mapping", list: "a list", type(None): "null (nothing)", bytes: "binary"}
    return names.get(type(value), f"a {type(value).__name__}")


def check_keys(value: object, where: str) -> None:
    """Raise `YamlFileError` for a key that is not text (`1:`, `yes:`, `null:`) at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise YamlFileError(
                    f"{where}: key {_written(key)} is {kind(key)}, where text belongs; quote it"
                )
            check_keys(item, where)
    elif isinstance(value, list):
        for item in value:
            check_keys(item, where)


def _written(key: object) -> str:
    return json.dumps(key) if key is None or isinstance(key, bool) else _cut(str(key))


def _cut(text: str | None, times: int = 1) -> str:
    text, most = str(text), times * _LONGEST
    return text if len(text) <= most else f"{text[:most]}..."


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise YamlFileError(f"{display(path)}: no such file") from None
    except IsADirectoryError:
        raise YamlFileError(f"{display(path)}: a folder, not a file") from None
    except OSError as error:
        raise YamlFileError(f"{display(path)}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise YamlFileError(f"{path!r}: not a path: {error}") from None
    if len(raw) > MAX_BYTES:
        raise YamlFileError(f"{display(path)}: over 1 MB, which no job file is")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _place(raw[: error.start].decode("utf-8"))
        raise YamlFileError(
            f"{display(path)}: line {line}, column {column}: byte 0x{raw[error.start]:02x} is not "
            "UTF-8; save the file as UTF-8"
        ) from None


def _place(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys and aliases that expand beyond `MAX_VALUES`."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        # Values below each finished node, an alias counting as all that it stands for. The tree
        # keeps every node alive, so ids are not reused.
        self._sizes: dict[int, int] = {}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        if self._depth > _MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "nested too deeply", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        mark = node.start_mark
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias inside of itself", mark)
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
        if self._sizes[id(node)] > MAX_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"expands to more than {MAX_VALUES} values", mark
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = (key.tag, key.value)
            if name in seen:
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    f"key {_cut(key.value)!r} is given twice, first in line {seen[name].line + 1}",
                    key.start_mark,
                )
            seen[name] = key.start_mark
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, ArithmeticError, LookupError, AttributeError):
            # What PyYAML's converters raise for `2024-13-45` or `!!int ""`.
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{_cut(getattr(node, 'value', ''))!r} does not fit "
                f"{_cut(node.tag.rpartition(':')[2])}; quote it if it is text",
                node.start_mark,
            ) from None
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{_cut(str(node.value))!r} is a number of over {_MAX_BITS} bits; quote it if it "
                "is text",
                node.start_mark,
            )
        return value


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
