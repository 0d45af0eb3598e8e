r"""The chat template: what of it is run, and what a checkpoint's must give.

A chat template is a program. transformers runs it in jinja's sandbox, which keeps it from
attributes and files but not from using all time or memory (two nested `range(100000)`,
`'a' * 10**10`), nor from giving one text for one prompt and another for the next. Z-Image was
trained with one wrapping of the prompt, that of Qwen3 with thinking enabled:

    <|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n

So the template of a checkpoint is not what wraps prompts. It is run once, in a process of its own
with little time and memory and none of the environment, on prompts made up for this; where it
gives that text, prompts are wrapped by `TEMPLATE` here, which gives it too; else the checkpoint is
refused, since its text encoder was meant for something else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from zimage_core.config import CheckpointError, shown
from zimage_core.regular_file import read_regular

TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)
"""What Qwen3's own makes of plain conversations, tools and past thoughts left out."""

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
"""Between which a picture stands in a conversation."""

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1_000_000
_SECONDS = 20.0  # of wall clock, on a machine that is busy with other things
_PROBES = ("A cat", '{{ 7 * 7 }} {% x %} <b>"it\'s"</b>\n\n名前 \U0001f431 ', "a" * 3000)

# Runs in the process of its own: sandbox and filters as transformers sets them up.
_RENDERER = r"""
import json, sys
job = json.load(sys.stdin)
sys.path[:] = job["path"]
try:
    import resource
    for limit, most in ((resource.RLIMIT_CPU, 2), (resource.RLIMIT_AS, 2**30),
                        (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0)):
        resource.setrlimit(limit, (most, most))
except (ImportError, OSError, ValueError):
    pass
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
)
def refuse(message):
    raise ValueError(message)
environment.globals["raise_exception"] = refuse
environment.globals["strftime_now"] = lambda form: "2026-01-01"
environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
answer = {}
try:
    template = environment.from_string(job["template"])
    for probe, expected in job["probes"]:
        text = template.render(messages=[{"role": "user", "content": probe}], tools=None,
                               documents=None, add_generation_prompt=True, enable_thinking=True,
                               bos_token="", eos_token="<|im_end|>")
        if text != expected:
            answer = {"probe": probe[:100], "gives": text[:200]}
            break
except Exception as error:
    answer = {"error": f"{type(error).__name__}: {error}"[:300]}
json.dump(answer, sys.stdout)
"""


def wrapped(prompt: str) -> str:
    """A prompt as Z-Image was trained with it."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def edit_segments(prompt: str, num_pictures: int) -> list[str]:
    """The text of an edit, cut where a picture, and at last the image itself, stands.

    Args:
        prompt: what is asked for.
        num_pictures: pictures it is asked of; with none there is one segment, `wrapped`.

    Returns:
        `num_pictures` + 2 segments, or 1; see `edit_layout`.
    """
    if num_pictures == 0:
        return [wrapped(prompt)]
    between = [VISION_END + VISION_START] * (num_pictures - 1)
    opened = "<|im_start|>user\n" + VISION_START
    asked = f"{VISION_END}{prompt}<|im_end|>\n<|im_start|>assistant\n{VISION_START}"
    return [opened, *between, asked, VISION_END + "<|im_end|>"]


def check_template(folder: Path, config: dict[str, Any]) -> str:
    """Find a checkpoint's template, and see that it wraps prompts as Z-Image was trained.

    Args:
        folder: `tokenizer/` of a checkpoint.
        config: what its `tokenizer_config.json` says.

    Returns:
        `TEMPLATE`.

    Raises:
        CheckpointError: there is no template; it cannot be read or run, does not end in time, or
            gives another text.
    """
    path, template = folder / "tokenizer_config.json", config.get("chat_template")
    file = folder / TEMPLATE_FILE
    if os.path.lexists(file):  # where transformers 5 saves it
        path = file
        try:
            template = read_regular(file, MAX_TEMPLATE_BYTES).decode("utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(template, str):
        raise CheckpointError(
            f"{path}: chat_template is {shown(template)}; allowed: a template as text"
        )
    if len(template) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(
            f"{path}: chat_template has {len(template):,} characters; allowed: up to "
            f"{MAX_TEMPLATE_BYTES:,}"
        )
    problem = None if template == TEMPLATE else _problem(template)
    if problem is not None:
        raise CheckpointError(f"{path}: chat_template {problem}")
    return TEMPLATE


@lru_cache(maxsize=16)
def _problem(template: str) -> str | None:
    """What is wrong with a template; None where it wraps every probe as it must."""
    job = {
        "path": sys.path,
        "template": template,
        "probes": [(probe, wrapped(probe)) for probe in _PROBES],
    }
    try:
        # Isolated, and without an environment: nothing of this process is there to be found.
        done = subprocess.run(
            [sys.executable, "-I", "-c", _RENDERER],
            input=json.dumps(job).encode(),
            capture_output=True,
            env={"PATH": os.environ.get("PATH", "")},
            timeout=_SECONDS,
            check=False,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"does not end within {_SECONDS:g} s; allowed: one that wraps a prompt as Qwen3's"
    except ValueError:  # killed by a limit, without an answer
        return (
            f"needs too much time or memory (it ended with status {done.returncode}); allowed: one "
            "that wraps a prompt as Qwen3's"
        )
    if "error" in answer:
        return f"cannot be run: {answer['error']}"
    if answer:
        return (
            f"gives {shown(answer['gives'])} for {shown(answer['probe'])}; allowed: what Z-Image "
            f"was trained with, {wrapped('PROMPT')!r}"
        )
    return None
