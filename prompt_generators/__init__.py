"""Prompt generators: profile tables in, prompts out. They know neither the model nor the runner.

`make_generator` builds one by name (`avatars`, `food`, `gaming`, `table`, `template`, or
`package.module:Class`); `docs/generators.md` shows how to add one. Importing this package is cheap:
pandas and openpyxl are imported when the first table is read.
"""

from prompt_generators.base import (
    ProfileError,
    Prompt,
    PromptGenerator,
    Scalar,
    generator_length,
    prompt_at,
)
from prompt_generators.profiles import Profiles, read_profiles
from prompt_generators.registry import (
    GENERATORS,
    generator_source,
    make_generator,
    resolve_generator,
)

__all__ = [
    "GENERATORS",
    "ProfileError",
    "Profiles",
    "Prompt",
    "PromptGenerator",
    "Scalar",
    "generator_length",
    "generator_source",
    "make_generator",
    "prompt_at",
    "read_profiles",
    "resolve_generator",
]
