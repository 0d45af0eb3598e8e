"""Calls of the real command line in this process, on a small job in a folder of its own."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from job_runs import ROOT

from jobs.cli import main

CHECKPOINT = ROOT / "data/checkpoints/z-image-tiny"
AVATARS = ROOT / "data/profiles/avatars.xlsx"

JOB = f"""
name: t
model: {{path: {CHECKPOINT}, dtype: float32}}
prompts: {{generator: avatars, count: 8}}
sampling: {{width: 32, height: 32, num_inference_steps: 1}}
output: {{uri: out, shard_size: 4}}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class CommandLine:
    """`zimage` in a folder that holds `job.yaml`, and the files around it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        self.write("job.yaml", JOB)

    def __call__(self, *arguments: object, code: int) -> Ended:
        """Run a command; `code` is the exit code that it must have."""
        try:
            found = main([str(a) for a in arguments])
        except SystemExit as exit:  # argparse's way to refuse a flag
            found = exit.code
        captured = self._capsys.readouterr()
        return self._checked(Ended(found, captured.out, captured.err), code)

    def run(self, *arguments: object, code: int) -> Ended:
        """`zimage run job.yaml --local ...`."""
        return self("run", "job.yaml", "--local", *arguments, code=code)

    def process(self, *arguments: object, code: int, program: Any = "-m jobs") -> Ended:
        """The same in a process of its own: a driver that dies leaves its claim behind."""
        start = [sys.executable, *program.split()] if isinstance(program, str) else program
        done = subprocess.run(
            [*start, *map(str, arguments)],
            cwd=self.folder,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return self._checked(Ended(done.returncode, done.stdout, done.stderr), code)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if path.suffix == ".py":  # another test of this process may have had one of that name
            sys.modules.pop(path.stem, None)
            importlib.invalidate_caches()
        return path

    def write_generator(self, body: str, module: str = "mine") -> str:
        """A class `Mine` whose `generate_prompt(index)` has `body`; its name for a job file."""
        self.write(
            f"{module}.py",
            "from prompt_generators import Prompt\n\nclass Mine:\n"
            f"    def generate_prompt(self, index):\n        {body}\n",
        )
        return f"{module}:Mine"

    def rows(self, output: str = "out") -> list[dict[str, Any]]:
        return pq.read_table(self.folder / output / "metadata.parquet").to_pylist()

    def _checked(self, ended: Ended, code: int) -> Ended:
        assert ended.code == code, ended.out + ended.err
        assert "Traceback" not in ended.err, ended.err
        return ended
