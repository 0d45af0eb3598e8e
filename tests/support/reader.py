"""Someone who has a clone of the project and types what its pages say.

The clone is a model of a real one to scale: the published checkpoints are the tiny ones, jobs have
six images, and the addresses that pages name as examples are servers on loopback. Everything else
is as a user has it: a shell, the installed commands, Ray's own, SSH.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import psutil
import torch
from document_pages import ROOT, shell_lines
from foreign_layouts import comfy_transformer, transformer_state, write_gguf
from PIL import Image
from safetensors.torch import save_file

from jobs.errors import ClusterError
from jobs.submission import connect

TINY, TINY_EDIT = (f"data/checkpoints/z-image-tiny{kind}" for kind in ("", "-edit"))
FETCH = "zimage weights download Tongyi-MAI/Z-Image-Turbo"
DASHBOARD = "http://127.0.0.1:8265"
PRESET = """
model: {path: ../ckpts/Z-Image-Turbo, repo: Tongyi-MAI/Z-Image-Turbo, dtype: float32}
sampling: {width: 64, height: 64, num_inference_steps: 2, guidance_scale: 0.0}
"""
# What is too much for a CPU, or stands for something of the reader's own.
TO_SCALE = (
    (r"--count 8000", "--count 8"),
    (r" 12 4711 ", " 1 4 "),
    (r"^(zimage bench --model ckpts/\S+)", r"\1 --sizes 64 --steps 2 --compile without"),
    (r"^zimage generate --model ckpts/(?!.*--image )", "zimage generate {size} --model ckpts/"),
    (r"--steps 50", "--steps 4"),
    (r"\b(HEAD|HOST)\b", "127.0.0.1"),
    (r"\bYOU/", "reader/"),
    (r"(?<=[ =])/(shared|tmp)/", r"{home}/\1/"),
    (r"-L 8420:", "-L 8421:"),  # both ends are this machine
)  # fmt: skip
SIZE = "--width 64 --height 64"
STAYS = re.compile(r"--serve\b|--block\b|^ssh ")
LIMIT = 600  # seconds for one line


@dataclass
class Reader:
    """A clone in `folder`, and a shell in it.

    Attributes:
        folder: working directory of every line.
        home: `HOME`, a new one.
        environment: of every line, without what the block has exported.
        needs: what lines need that a reader has got before: a word of the line, and a function
            that makes it where it is not there.
    """

    folder: Path
    home: Path
    environment: dict[str, str]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    staying: list[subprocess.Popen[bytes]] = field(default_factory=list)
    head: subprocess.Popen[bytes] | None = None
    needs: dict[str, Callable[[], None]] = field(default_factory=dict)

    @classmethod
    def arrive(cls, at: Path, servers: Mapping[str, str]) -> "Reader":
        """A new clone and home below `at`; `servers` are variables that lead to them."""
        folder, home = at / "project", at / "home"
        home.mkdir(parents=True)
        copy_project(folder)
        path = f"{home}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        reader = cls(folder, home, dict(os.environ))
        reader.environment |= servers
        reader.environment |= {
            "HOME": str(home),
            "PATH": path,
            "PYTHONPATH": str(folder),
            "ZIMAGE_READER": reader.mark,
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_TOKEN": "hf_reader",
        }
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "VIRTUAL_ENV"):
            reader.environment.pop(name, None)
        (home / "shared").mkdir()
        (home / "tmp").mkdir()
        reader.needs = reader._needs()
        return reader

    def read(self, blocks: list[list[str]]) -> list[str]:
        """Type the lines of a page; returns what failed, with its words."""
        failed = []
        for lines in blocks:
            exported: dict[str, str] = {}
            for line in lines:
                typed = self.to_scale(line)
                self.get_ready(line)
                if line.startswith("export "):
                    exported |= self._exported(typed)
                    continue
                if problem := self.type(typed, exported):
                    failed.append(f"$ {typed}\n{problem}")
        return failed

    def type(self, line: str, exported: Mapping[str, str] = {}) -> str | None:
        """Run one line until it ends, or until it is there for others; returns what went wrong."""
        environment = self.environment | exported
        print(f"$ {line}", flush=True)
        if STAYS.search(line):
            return self._start(line, environment)
        try:
            run = subprocess.run(
                ["bash", "-c", line],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return f"did not end in {LIMIT} s: {error.output}"
        print(run.stdout, flush=True)
        return f"exit code {run.returncode}\n{run.stdout}" if run.returncode else None

    def to_scale(self, line: str) -> str:
        """The line as it can be typed here."""
        for pattern, replacement in TO_SCALE:
            line = re.sub(pattern, replacement.format(home=self.home, size=SIZE), line)
        return line

    def get_ready(self, line: str) -> None:
        """Do what the reader of this line has done before."""
        command = line.partition(" #")[0]
        for word, get in self.needs.items():
            if re.search(word, command) and "weights download" not in command:
                get()

    def leave(self) -> list[str]:
        """Press Ctrl-C where something still runs; returns what did not end well."""
        problems = []
        try:
            while self.staying:
                process = self.staying.pop()
                code = _press_ctrl_c(process)
                if "--serve" in str(process.args) and code != 0:
                    problems.append(f"{process.args}: exit code {code} after Ctrl-C")
            self.stop_head()
        finally:
            for found in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if found.environ().get("ZIMAGE_READER") == self.mark:
                        found.kill()
        return problems

    def start_head(self) -> None:
        """The cluster that the page takes for granted, by the lines of docs/cluster.md."""
        if self.head is None:
            (line,) = [
                line
                for line in shell_lines(ROOT / "docs/cluster.md")
                if line.startswith("ray start --head")
            ]
            assert self._start(line, self.environment) is None

    def stop_head(self) -> None:
        """Ctrl-C in its shell."""
        if self.head is not None:
            head, self.head = self.head, None
            _press_ctrl_c(head)

    def _start(self, line: str, environment: Mapping[str, str]) -> str | None:
        log = self.home / f"stays-{len(self.staying)}-{time.monotonic_ns()}"
        process = subprocess.Popen(
            # heeded also where these tests run in the background of a script, which ignores it
            ["env", "--default-signal=INT", "bash", "-c", f"exec {line}"],
            cwd=self.folder,
            env=dict(environment),
            stdin=subprocess.PIPE,  # an `ssh HOST` that reads its end would close
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if line.startswith("ray start"):
            self.head = process
        else:
            self.staying.append(process)
        end = time.monotonic() + 120
        while not self._answers(line, log):
            said = log.read_text()
            if process.poll() is not None:
                return f"ended with {process.returncode}\n{said}"
            if time.monotonic() > end:
                return f"did not answer in 120 s\n{said}"
            time.sleep(0.5)
        return None

    def _answers(self, line: str, log: Path) -> bool:
        if line.startswith("ray start"):
            with contextlib.suppress(ClusterError):
                connect(DASHBOARD)
                return True
            return False
        served = [log, *sorted(self.home.glob("stays-*"))]
        urls = [
            url
            for file in served
            for url in re.findall(r"http://127\S+:8420/\S+", file.read_text())
        ]
        if not urls:
            return False
        url = urls[0].replace(":8420/", ":8421/") if line.startswith("ssh") else urls[0]
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
            return b"<html" in answer.read(2000)
        return False

    def _exported(self, line: str) -> dict[str, str]:
        printed = subprocess.run(
            ["bash", "-c", f"{line}\nenv -0"],
            env=self.environment,
            capture_output=True,
            check=True,
        ).stdout.decode()
        pairs = dict(pair.split("=", 1) for pair in printed.split("\0") if pair)
        return {name: value for name, value in pairs.items() if f"{name}=" in line}

    def _needs(self) -> dict[str, Callable[[], None]]:
        def in_project(name: str, make: Callable[[Path], object]) -> Callable[[], None]:
            def get() -> None:
                path = self.folder / name
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    make(path)

            return get

        def copy(source: str) -> Callable[[Path], object]:
            folder = ROOT / source
            return lambda path: (shutil.copytree if folder.is_dir() else shutil.copy)(folder, path)

        def job(*flags: str) -> Callable[[Path], object]:
            return lambda _: self._run_job(*flags)

        picture = copy("data/profiles/edit/cap.png")
        turbo = in_project("ckpts/Z-Image-Turbo", lambda _: self._must(FETCH))
        mine = r"(status|verify|regen|gc|export|gallery|report|plan|run|generate --from) .*"
        return {
            r"ckpts/Z-Image-Turbo": turbo,
            r"ckpts/Z-Image-Edit": in_project("ckpts/Z-Image-Edit", copy(TINY_EDIT)),
            rf"^zimage {mine}(output/avatars(?![-\w])|redo-rejected)": in_project(
                "output/avatars/metadata.parquet", job()
            ),
            r"gallery s3://": in_project("output/s3", job("--output", "s3://my-bucket/avatars")),
            r"image\.png": in_project("image.png", self._own_image),
            r"\bin\.png": in_project("in.png", picture),
            r"\blamp\.png": in_project("lamp.png", picture),
            r"\bmask\.png": in_project("mask.png", _mask),
            r"ink\.safetensors": in_project("ink.safetensors", _adapter),
            r"finetune\.gguf": in_project("finetune.gguf", _gguf),
            r"rejected\.csv": in_project(
                "rejected.csv", lambda path: path.write_text("index\n1\n")
            ),
            r"^(make|\.venv)": in_project(
                ".venv", lambda path: path.symlink_to(Path(sys.executable).parents[1])
            ),
            r"http://HEAD": self.start_head,
            r"^ray submit --start": self.stop_head,
        }

    def _run_job(self, *flags: str) -> None:
        self.get_ready("ckpts/Z-Image-Turbo")
        self._must(" ".join(["zimage run jobs/avatars.yaml --local", *flags]))
        if flags:
            (self.folder / "output/s3").mkdir(parents=True)

    def _must(self, line: str) -> None:
        problem = self.type(line)
        assert problem is None, problem

    def _own_image(self, path: Path) -> None:
        self.get_ready("zimage status output/avatars")
        source = next(self.folder.glob("output/avatars/images/*/avatars_00000000.png"))
        shutil.copy(source, path)


def _press_ctrl_c(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; that which it has already, where it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    return process.wait(60)


def copy_project(folder: Path) -> None:
    """Everything that a clone would have, as it is now; smaller where it has published sizes."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # deleted, but not yet committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "configs/z-image-turbo.yaml").write_text(PRESET)
    for job in (folder / "jobs").glob("*.yaml"):
        text = re.sub(r"count: 6000\b", "count: 6", job.read_text())
        job.write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def _mask(path: Path) -> None:
    """As the lines of Python before it make it."""
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 128, 48))
    mask.save(path)


def _gguf(path: Path) -> None:
    state = comfy_transformer(transformer_state(ROOT / TINY))
    write_gguf(path, state, lambda *_: gguf.GGMLQuantizationType.F16)


def _adapter(path: Path) -> None:
    """A LoRA of rank 2 on one module of the tiny transformer."""
    weight = transformer_state(ROOT / TINY)["layers.0.attention.to_q.weight"]
    rows, columns = weight.shape
    name = "transformer.layers.0.attention.to_q"
    save_file(
        {
            f"{name}.lora_A.weight": torch.full((2, columns), 0.01),
            f"{name}.lora_B.weight": torch.full((rows, 2), 0.01),
        },
        path,
    )
