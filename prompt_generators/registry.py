"""The generators by name, and how one is made from a job's settings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from prompt_generators.base import PromptGenerator
from prompt_generators.vocabulary import vocabulary_path

GENERATORS: dict[str, str] = {
    "avatars": "prompt_generators.avatars:AvatarGenerator",
    "food": "prompt_generators.food:FoodGenerator",
    "gaming": "prompt_generators.gaming:GamingGenerator",
    "table": "prompt_generators.table:TableGenerator",
    "template": "prompt_generators.template:TemplateGenerator",
}
"""Name in a job file -> `module:Class`. A new built-in generator is one line here."""

_SHARED_MODULES = ("base", "composer", "profiles", "spreadsheet", "vocabulary")


def resolve_generator(name: str) -> type[PromptGenerator]:
    """The class called `name`: a key of `GENERATORS`, or `package.module:Class`.

    Naming a class imports its module, which runs the module's code.

    Raises:
        ValueError: no such name, the module cannot be imported, or it has no such generator.
    """
    target = _target(name)
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard exits when imported
        raise ValueError(
            f"generator {name!r}: importing {module_name!r} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ValueError(f"generator {name!r}: module {module_name!r} has no {class_name!r}")
    if not inspect.isclass(found) or not callable(getattr(found, "generate_prompt", None)):
        raise ValueError(
            f"generator {name!r}: {found!r} is not a class with a method generate_prompt(index)"
        )
    return cast("type[PromptGenerator]", found)


def _target(name: object) -> str:
    if isinstance(name, str):
        if name in GENERATORS:
            return GENERATORS[name]
        module_name, colon, class_name = name.partition(":")
        parts = module_name.split(".")
        if colon and class_name.isidentifier() and all(part.isidentifier() for part in parts):
            return name
    known = ", ".join(sorted(GENERATORS))
    raise ValueError(f"no generator {name!r} (allowed: {known}, or package.module:Class)")


def make_generator(
    name: str,
    *,
    profiles: Path | str | None = None,
    sheet: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PromptGenerator:
    """Construct the generator called `name`.

    Its class gets `profiles` and `sheet` if its constructor takes them, and `options` as keyword
    arguments. What is given but not taken is an error, never dropped.

    Raises:
        ProfileError: the table cannot be used.
        ValueError: see `resolve_generator`; an option that is unknown, missing or not allowed; a
            table or sheet for a class that takes none; any exception of a custom constructor.
    """
    found = resolve_generator(name)
    signature = inspect.signature(found)
    kinds = {parameter.name: parameter.kind for parameter in signature.parameters.values()}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    taken = {
        key
        for key, kind in kinds.items()
        if kind not in positional and kind != inspect.Parameter.VAR_KEYWORD
    }
    arguments: dict[str, Any] = {}
    for key, value in (("profiles", profiles), ("sheet", sheet)):
        if key in taken or takes_any:
            arguments[key] = value
        elif value is not None:
            raise ValueError(f"generator {name!r} takes no {key}, got {str(value)!r}")
    allowed = sorted(taken - {"profiles", "sheet"})
    for key, value in (options or {}).items():
        if key not in allowed and (not takes_any or key in {"profiles", "sheet"}):
            shown = ", ".join(allowed) or "none"
            raise ValueError(f"generator {name!r} has no option {key!r} (allowed: {shown})")
        arguments[key] = value
    for key, parameter in signature.parameters.items():
        required = parameter.default is inspect.Parameter.empty
        if required and key in allowed and key not in arguments:
            raise ValueError(f"generator {name!r} needs the option {key!r}")
    try:
        return found(**arguments)
    except ValueError as error:
        if name in GENERATORS and type(error) is ValueError:
            raise ValueError(f"generator {name!r}: {error}") from error
        raise
    except Exception as error:
        raise ValueError(
            f"generator {name!r}: its constructor raised {type(error).__name__}: {error}"
        ) from error


def generator_source(name: str) -> list[Path]:
    """The files whose content defines what the generator does, sorted; for its fingerprint.

    For a built-in generator: its module, the modules it builds on and its vocabulary. For a custom
    one: the module named and the one that defines the class, but not what these import.

    Raises:
        ValueError: see `resolve_generator`; a class without a source file.
    """
    found = resolve_generator(name)
    modules = {_target(name).partition(":")[0], found.__module__}
    if name in GENERATORS:
        modules |= {f"prompt_generators.{module}" for module in _SHARED_MODULES}
    files = set()
    for module_name in modules:
        module = importlib.import_module(module_name)
        source = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
        if source is None:
            raise ValueError(f"generator {name!r}: {module_name!r} has no source file")
        files.add(Path(source))
    if name in GENERATORS and vocabulary_path(name).is_file():
        files.add(vocabulary_path(name))
    return sorted(files)
