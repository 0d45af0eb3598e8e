"""`zimage bench`: its rows, its page, and what goes wrong, on the tiny checkpoint on a CPU."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import CommandLine
from job_runs import ROOT

from jobs import bench
from jobs.bench_rows import compared_with, decoder_flops, timed_row
from jobs.cli import main
from jobs.conditions import company, driver_version, find_device, page_path
from jobs.errors import InputError
from jobs.quantities import scaled, short_time
from jobs.resources import bundle_root
from jobs.roofline import TransformerSize, denoising_flops
from jobs.stage_times import StageTimes, Stopwatch, Timing, fixed_prompts
from zimage_core import ZImagePipeline, compilation, load_from_local_dir
from zimage_core.config import AutoencoderConfig, TransformerConfig

TINY = bundle_root() / "data" / "checkpoints" / "z-image-tiny"
PUBLISHED_VAE = ROOT / "zimage_core" / "published" / "vae.json"
STEPS, REPEATS, BATCH = 3, 2, 2
SMALL = ["--device", "cpu", "--steps", STEPS, "--repeats", 1, "--compile", "without"]
FILES = ["png", "jpeg", "webp"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """The object, the page and standard error of one whole run."""
    page = tmp_path_factory.mktemp("bench") / "page.md"
    out, err = io.StringIO(), io.StringIO()
    arguments = ["bench", "--model", TINY, "--sizes", 32, 48, *SMALL, "--batch-size", BATCH]
    arguments += ["--repeats", REPEATS]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([str(a) for a in [*arguments, "--output", page, "--json"]]) == 0
    return json.loads(out.getvalue()), page.read_text(encoding="utf-8"), err.getvalue()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], None]]:
    """Lets a test put a hook before the transformer's first main block."""
    load = bench._load

    def limit(hook: Callable[..., Any]) -> None:
        def with_hook(*arguments: Any) -> ZImagePipeline:
            pipeline = load(*arguments)
            pipeline.transformer.layers[0].register_forward_pre_hook(hook)
            return pipeline

        monkeypatch.setattr(bench, "_load", with_hook)

    yield limit


def stages_of(report: dict[str, Any], **where: Any) -> list[str]:
    return [
        row["stage"]
        for row in report["rows"]
        if all(row[key] == value for key, value in where.items())
    ]


def test_every_stage_of_every_configuration_has_a_row(measured: Any) -> None:
    report, _, _ = measured
    assert stages_of(report, pixels=None) == ["text_encoding"]
    for side in (32, 48):
        assert stages_of(report, pixels=side, attention=None) == ["decode", *FILES]
        for backend in ("native", "_native_flash"):
            found = stages_of(report, pixels=side, attention=backend, compile=False)
            assert found == ["step", "denoise", "end_to_end"]
    assert len(report["rows"]) == 1 + 2 * (4 + 2 * 3)
    for row in report["rows"]:
        assert row["status"] == "ok" and row["reason"] is None
        assert 0 < row["lowest_seconds"] <= row["median_seconds"] <= row["highest_seconds"]
        assert row["peak_bytes"] is None  # of a CPU


def test_forwards_are_counted_and_steps_are_timed_inside_of_a_run(measured: Any) -> None:
    report, _, _ = measured
    for row in report["rows"]:
        assert row["forwards"] == (STEPS if row["stage"] == "denoise" else None)
        assert row["runs"] == (REPEATS * (STEPS - 1) if row["stage"] == "step" else REPEATS)
    assert report["settings"]["warm_up_runs"] == 1


def test_operations_are_of_the_whole_batch_and_of_this_checkpoint(measured: Any) -> None:
    report, _, _ = measured
    size = TransformerSize.of(TransformerConfig.from_json(TINY / "transformer" / "config.json"))
    caption = report["settings"]["caption_tokens"]
    for row in report["rows"]:
        side = row["pixels"]
        if row["stage"] == "step":
            assert row["flops"] == BATCH * size.step_flops(side, side, caption)
        elif row["stage"] == "denoise":
            assert row["flops"] == BATCH * denoising_flops(size, side, side, STEPS, caption)
        if row["flops"] is not None:
            assert row["flops_per_second"] == row["flops"] / row["median_seconds"]
        assert row["mfu"] is None and row["limit_seconds"] is None
    assert report["limit"]["reason"] == "no peak is known for a CPU"


def test_backends_are_compared_with_the_first_one(measured: Any) -> None:
    report, _, _ = measured
    for row in report["rows"]:
        if row["stage"] == "denoise":
            assert (row["difference"] == 0) or row["attention"] != "native"
            assert row["difference"] < 1e-4


def test_what_cannot_run_is_named_with_its_reason(measured: Any) -> None:
    report, page, err = measured
    reasons = {entry["attention"]: entry["reason"] for entry in report["not_run"]}
    assert set(reasons) == {"flash", "_flash_3"}
    for name, reason in reasons.items():
        assert "is not installed" in reason or "CUDA" in reason
        assert f"- `{name}`: {reason}" in " ".join(page.split())
        assert f"not run: attention {name}: {reason}" in err


def test_page_says_what_a_reader_asks(measured: Any) -> None:
    report, page, err = measured
    text = " ".join(page.split())  # lines are broken anywhere
    assert page.startswith(f"# Z-Image on {report['conditions']['device']}\n")
    table = page.split("## Images\n\n", 1)[1].split("\n\n", 1)[0].splitlines()
    head = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert head == [
        *("pixels", "attention", "compiled", "one step", "denoising", "end to end", "images/s"),
        *("achieved", "forwards", "differs by"),
    ]  # no MFU, limit and peak memory, which a CPU has not
    assert [line.split("|")[1].strip() for line in table[2:]] == ["32 x 32"] * 2 + ["48 x 48"] * 2
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert "(MFU) is left out: no peak is known for a CPU." in text
    assert "Median of 2 runs after 1 that did not count." in text
    assert "**Not the published model**" in text
    assert all(len(line) <= 120 for line in page.splitlines() if not line.startswith("|"))
    # computed for this number of steps
    assert "needs 167 TFLOP" in text and "0.21 s on an H100 at 800" in text
    for fact in ("torch 2.", "| threads | 1 |", report["settings"]["prompt"].format(1)):
        assert fact in page
    assert report["page"] not in page and str(TINY.parent) not in page  # places of this machine
    assert f"{report['page']}: written" in err


def test_keys_are_described(measured: Any) -> None:
    report, _, _ = measured
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = text.split("\n## bench\n", 1)[1].split("\n## ", 1)[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    described = [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]
    assert [key for key in described if key in report] == list(report)
    inner = [report["rows"][0], report["not_run"][0]]
    inner += [report[key] for key in ("conditions", "model", "settings", "limit")]
    for key in (key for mapping in inner for key in mapping):
        assert f"`{key}`" in section, key


def test_known_card_by_hand() -> None:
    # 55.6 TFLOP in a tenth of a second: 556 TFLOP/s, of an H100's 989 more than half.
    row = timed_row(Timing((0.2, 0.1, 0.05), (), None), "h100", stage="step", flops=55.6e12)
    assert row.flops_per_second == pytest.approx(556e12)
    assert row.mfu == pytest.approx(556 / 989)
    assert row.limit_seconds == pytest.approx(55.6 / 800)
    assert (row.lowest_seconds, row.highest_seconds, row.runs) == (0.05, 0.2, 3)
    row = timed_row(Timing((5.24,), (), None), "rtx4090", stage="denoise", flops=445e12)
    assert row.mfu == pytest.approx(0.514, abs=1e-3)
    assert row.limit_seconds == pytest.approx(2.69, abs=5e-3)
    row = timed_row(Timing((1.0,), (), None), None, stage="denoise", flops=445e12)
    assert (row.mfu, row.limit_seconds, row.flops_per_second) == (None, None, 445e12)


def test_only_a_known_card_in_16_bits_is_compared_with_a_peak() -> None:
    assert compared_with("NVIDIA H200", "cuda", torch.bfloat16) == ("h200", None)
    for name, kind, dtype, words in (
        ("NVIDIA H100 PCIe", "cuda", torch.bfloat16, "the peak of 'NVIDIA H100 PCIe' is not known"),
        ("NVIDIA H200", "cuda", torch.float32, "this was float32"),
        ("AMD EPYC", "cpu", torch.bfloat16, "no peak is known for a CPU"),
        ("mps", "mps", torch.float16, "no peak is known for mps"),
    ):
        card, reason = compared_with(name, kind, dtype)
        assert card is None and reason is not None and words in reason


def test_decoder_of_the_published_size_by_hand() -> None:
    # 10.47 TFLOP at 1024 x 1024, convolution by convolution
    config = AutoencoderConfig.from_json(PUBLISHED_VAE)
    assert decoder_flops(config, (1, 16, 128, 128)) == pytest.approx(10.47e12, rel=1e-3)
    assert decoder_flops(config, (2, 16, 8, 8)) == 2 * decoder_flops(config, (1, 16, 8, 8))


def test_size_that_does_not_fit_is_a_row(zimage: CommandLine, loaded: Any) -> None:
    def small_device(module: Any, arguments: Any) -> None:
        if arguments[0].shape[1] > 128:  # tokens: 16 + 96 of 64 px, 64 + 96 of 128 px
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    loaded(small_device)
    ended = zimage(
        *("bench", "--model", TINY, "--sizes", 128, 64, *SMALL, "--attention", "native"),
        *("--output", "p.md", "--json"),
        code=0,
    )
    rows = json.loads(ended.out)["rows"]
    failed = [row for row in rows if row["status"] != "ok"]
    assert [(row["stage"], row["pixels"]) for row in failed] == [
        *(("step", 128), ("denoise", 128), ("end_to_end", 128)),
    ]
    for row in failed:
        assert row["status"] == "out_of_memory" and row["median_seconds"] is None
        assert row["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    # Noise was decoded in place of latents, and the other size is whole.
    assert [row["stage"] for row in rows if row["pixels"] == 128 and row["status"] == "ok"] == [
        "decode",
        *FILES,
    ]
    assert len([row for row in rows if row["pixels"] == 64]) == 7
    page = (zimage.folder / "p.md").read_text()
    assert "| 128 x 128 | `native` | no | out of memory | out of memory | out of memory |" in page
    assert "128 px  native                  out of memory: OutOfMemoryError: CUDA" in ended.err


def test_what_fails_otherwise_costs_its_rows_and_the_exit_code(
    zimage: CommandLine, loaded: Any
) -> None:
    def no_kernel(module: Any, arguments: Any) -> None:
        if module.attention.backend == "_native_flash":
            raise RuntimeError("No available kernel. Aborting execution.")

    loaded(no_kernel)
    ended = zimage("bench", "--model", TINY, "--sizes", 32, *SMALL, "--output", "p.md", code=5)
    page = (zimage.folder / "p.md").read_text()
    assert "| 32 x 32 | `_native_flash` | no | failed | failed | failed |" in page
    assert "| RuntimeError: No available kernel. Aborting execution. |" in page
    assert re.search(r"end to end +32 px +native +[\d.]+ m?s \(", ended.out)
    assert "computed, not measured:\n- The published 6B transformer needs 167 TFLOP" in ended.out
    assert ended.out.endswith("p.md: written\n")


def test_interrupted_run_writes_what_it_has(zimage: CommandLine, loaded: Any) -> None:
    def interrupt(module: Any, arguments: Any) -> None:
        if arguments[0].shape[1] > 128:
            raise KeyboardInterrupt

    loaded(interrupt)
    arguments = ["bench", "--model", TINY, "--sizes", 64, 128, *SMALL, "--attention", "native"]
    ended = zimage(*arguments, "--output", "p.md", code=130)
    page = (zimage.folder / "p.md").read_text()
    assert "**Not complete: interrupted.**" in page
    assert "| 64 x 64 | `native` |" in page and "128 x 128 | `native`" not in page
    assert "stopped: interrupted" in ended.err


def test_failed_device_ends_the_run_with_what_it_has(zimage: CommandLine, loaded: Any) -> None:
    def illegal(module: Any, arguments: Any) -> None:
        if module.attention.backend == "_native_flash":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    loaded(illegal)
    ended = zimage("bench", "--model", TINY, "--sizes", 32, 48, *SMALL, "--output", "p.md", code=5)
    page = (zimage.folder / "p.md").read_text()
    assert "**Not complete: the device failed: RuntimeError: CUDA error" in " ".join(page.split())
    assert page.count("| `_native_flash` | no |") == 1  # nothing was tried after it
    assert "stopped: the device failed" in ended.err


def test_pages_are_not_lost(zimage: CommandLine, loaded: Any) -> None:
    loaded(lambda module, arguments: None)
    now = datetime(2026, 11, 30, tzinfo=UTC)
    first = page_path(None, now, "NVIDIA H100 80GB HBM3")
    assert first == Path("2026-11-30-bench-nvidia-h100-80gb-hbm3.md")
    zimage.write(str(first), "mine")
    assert page_path(None, now, "NVIDIA H100 80GB HBM3").stem.endswith("hbm3-2")
    zimage.write("p.md", "mine")
    arguments = ["bench", "--model", TINY, "--sizes", 32, *SMALL, "--attention", "auto"]
    ended = zimage(*arguments, "--output", "p.md", code=0)
    assert "p.md is there and will be replaced" in ended.err
    assert "p.md: written, in place of an earlier one" in ended.out


def test_more_forwards_than_steps_are_a_mistake_of_ours() -> None:
    class TwicePipeline(ZImagePipeline):
        def denoise(self, *arguments: Any, **options: Any) -> torch.Tensor:
            super().denoise(*arguments, **options | {"on_step": None})
            return super().denoise(*arguments, **options)

    pipeline = TwicePipeline(**load_from_local_dir(TINY, device="cpu", dtype=torch.float32))
    stages = StageTimes(pipeline, Stopwatch(torch.device("cpu"), 1), batch_size=1, steps=2)
    with pytest.raises(AssertionError, match=r"forwards of each run: \[4, 4\]; asked for: 2"):
        stages.denoise(64)


def test_prompts_of_a_batch_differ_and_need_no_mask() -> None:
    pipeline = ZImagePipeline(**load_from_local_dir(TINY, device="cpu", dtype=torch.float32))
    stages = StageTimes(pipeline, Stopwatch(torch.device("cpu"), 1), batch_size=40, steps=2)
    assert len(set(stages.prompts)) == 40
    lengths = pipeline.caption_lengths(stages.prompts)
    assert len({-(-length // 32) for length in lengths}) == 1


def test_prompts_of_another_padded_length_are_passed_over() -> None:
    class Tokens:
        def __init__(self, lengths: Callable[[int], int]) -> None:
            self.caption_lengths = lambda prompts: [lengths(int(p[-4:])) for p in prompts]

    every_third_is_longer: Any = Tokens(lambda number: 33 if number % 3 == 0 else 30 + number % 3)
    chosen = fixed_prompts(every_third_is_longer, 5)
    assert [int(prompt[-4:]) for prompt in chosen] == [1, 2, 4, 5, 7]
    each_is_longer: Any = Tokens(lambda number: 32 * number)
    with pytest.raises(ValueError, match="of 8 prompts only 1 have captions of one padded length"):
        fixed_prompts(each_is_longer, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "100"], "--sizes: 100: not divisible by 16; nearest: 96 or 112"),
        (["--sizes", "8"], "--sizes: 8: too small; nearest: 16"),
        (["--sizes", "16384"], "--sizes: 16384: the transformer has no positions for it"),
        (["--sizes", "x"], "argument --sizes: value 'x': allowed: a whole number, 1 or more"),
        (["--steps", "1"], "--steps: 1: a step is timed from the end of the one before; allowed"),
        (["--steps", "0"], "argument --steps: value '0': allowed: a whole number, 1 or more"),
        (["--repeats", "-1"], "argument --repeats: value '-1': allowed"),
        (["--batch-size", "many"], "argument --batch-size: value 'many': allowed"),
        (["--attention", "sage"], "--attention: 'sage': unknown; allowed: native, _native_flash"),
        (["--attention", "_flash_3"], "--attention: attention backend '_flash_3' cannot run here"),
        (["--compile", "maybe"], "argument --compile: invalid choice: 'maybe'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device", "gpu"], "--device: 'gpu': no such device; allowed: auto, cpu, cuda, cuda:N"),
        (["--device", "meta"], "--device: 'meta': cannot be used; allowed: auto, cpu, cuda"),
        (["--device", "cuda:99"], "--device: 'cuda:99': torch finds "),
        (["--output", "p.txt"], "--output: p.txt: allowed: a file that ends in .md"),
        (["--output", "no/p.md"], "--output: no/p.md: no such folder: no"),
    ],
)
def test_bad_arguments(zimage: CommandLine, arguments: list[str], message: str) -> None:
    ended = zimage("bench", "--model", TINY, "--device", "cpu", *arguments, code=2)
    assert message in ended.err
    assert ended.out == ""


def test_model_that_is_none(zimage: CommandLine) -> None:
    ended = zimage("bench", "--model", "nowhere", code=5)
    assert ended.err == (
        "zimage bench: --model: nowhere: no such folder; allowed: a checkpoint folder\n"
    )
    ended = zimage("bench", "--model", zimage.folder, "--device", "cpu", code=5)
    assert "model_index.json" in ended.err


def test_model_that_does_not_fit(zimage: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("zimage_core.loader.load_from_local_dir", full)
    ended = zimage("bench", "--model", TINY, "--device", "cpu", code=5)
    assert "its models do not fit into the memory of cpu together" in ended.err
    assert f"zimage doctor --model {TINY}" in ended.err


def test_compiling_that_is_not_possible_is_named(
    zimage: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: Any) -> None:
        raise compilation.CompileError("compile is not possible on MPS; load with compile=False")

    monkeypatch.setattr(compilation, "check_compile", refuse)
    small = ["--model", TINY, "--sizes", 32, "--steps", 2, "--repeats", 1, "--device", "cpu"]
    ended = zimage("bench", *small, "--attention", "native", "--output", "p.md", "--json", code=0)
    (entry,) = json.loads(ended.out)["not_run"]
    assert entry == {
        "attention": None,
        "compile": True,
        "reason": "compile is not possible on MPS",
    }
    assert "- compiled: compile is not possible on MPS" in (zimage.folder / "p.md").read_text()
    ended = zimage("bench", *small, "--compile", "with", code=2)
    assert "--compile: with: compile is not possible on MPS; allowed here: without" in ended.err


def test_blocks_that_do_not_compile_cost_their_configuration(
    zimage: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(transformer: Any, device: Any) -> None:
        raise compilation.CompileError("compile is not possible: Boom; load with compile=False")

    monkeypatch.setattr("jobs.bench_rows.compile_blocks", break_down)
    small = ["--model", TINY, "--sizes", 32, "--steps", 2, "--repeats", 1, "--device", "cpu"]
    ended = zimage("bench", *small, "--attention", "native", "--output", "p.md", "--json", code=0)
    report = json.loads(ended.out)
    assert report["not_run"] == [
        {"attention": "native", "compile": True, "reason": "compile is not possible: Boom"}
    ]
    assert stages_of(report, compile=True) == [] and stages_of(report, compile=False)


@pytest.mark.slow
def test_compiled_blocks_make_the_same_latents(zimage: CommandLine) -> None:
    small = ["--model", TINY, "--sizes", 32, "--steps", 2, "--repeats", 1, "--device", "cpu"]
    ended = zimage("bench", *small, "--attention", "native", "--output", "p.md", "--json", code=0)
    report = json.loads(ended.out)
    (compiled,) = [r for r in report["rows"] if r["compile"] and r["stage"] == "denoise"]
    assert compiled["status"] == "ok" and 0 < compiled["difference"] < 1e-4
    assert report["compile_seconds"]["native"] > 0
    assert "Compiling took " in (zimage.folder / "p.md").read_text()


class FakeCuda:
    """A stream whose work is done when it is waited for, a second after it was queued."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued = self.done = 0.0
        self.calls: list[str] = []
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.queued

            def elapsed_time(self, later: "Event") -> float:
                assert max(self.at, later.at) <= cuda.done, "the device is not done"
                return 1000 * (later.at - self.at)

        def synchronize(device: Any) -> None:
            self.done = self.queued
            self.calls.append("wait")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(
            torch.cuda, "reset_peak_memory_stats", lambda device: self.calls.append("reset")
        )
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * 2**30)

    def work(self, seconds: float) -> None:
        self.queued += seconds
        self.calls.append("work")


def test_cuda_is_waited_for_around_runs_and_not_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    watch = Stopwatch(torch.device("cuda", 0), 2)
    marks: list[Any] = []
    steps: list[float] = []

    def run() -> str:
        marks.clear()
        for seconds in (0.5, 0.25, 0.125):
            cuda.work(seconds)
            marks.append(watch.mark())
        return "latents"

    result, timing = watch.time(run, lambda: steps.extend(watch.between(marks)))
    assert result == "latents"
    assert steps == [0.25, 0.125] * 2  # not of the run that does not count
    assert timing.peak_bytes == 7 * 2**30 and len(timing.seconds) == 2
    one = ["work"] * 3 + ["wait"]
    assert cuda.calls == [*one, "reset", *one, *one]


def test_page_says_what_else_ran() -> None:
    cpu = {"device_type": "cpu", "load_average": 0.4, "cores": 2, "memory_bytes": None}
    gpu = {"device_type": "cuda", "load_average": 9.0, "cores": 2, "memory_bytes": 80 * 2**30}
    assert company(cpu) == company(gpu | {"free_bytes": 79.5 * 2**30}) == []
    (words,) = company(cpu | {"load_average": 1.2})
    assert words.startswith("the load before was 1.2 on 2 cores")
    assert company(gpu | {"free_bytes": 70 * 2**30}) == [
        "10.0 GiB of the GPU's memory were taken before"
    ]


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert find_device("cuda") == find_device("auto") == torch.device("cuda", 0)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    assert chosen == [0, 0, 1]
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="'cuda:2': torch finds CUDA GPUs 0 to 1 only here"):
        find_device("cuda:2")


def test_page_of_a_known_card(monkeypatch: pytest.MonkeyPatch, zimage: CommandLine) -> None:
    monkeypatch.setattr("jobs.bench_rows.compared_with", lambda *_: ("h100", None))
    monkeypatch.setenv("ZIMAGE_ATTENTION", "_flash_3")  # cannot run, and was not asked for
    arguments = ["bench", "--model", TINY, "--sizes", 32, *SMALL, "--attention", "native"]
    ended = zimage(*arguments, "--output", "p.md", "--json", code=0)
    report = json.loads(ended.out)
    page = " ".join((zimage.folder / "p.md").read_text().split())
    assert report["limit"]["peak_flops"] == 989e12 and report["limit"]["limit_flops"] == 800e12
    (row,) = [row for row in report["rows"] if row["stage"] == "denoise"]
    assert row["mfu"] == row["flops"] / row["median_seconds"] / 989e12
    assert row["limit_seconds"] == row["flops"] / 800e12
    assert re.search(r"denoising .* MFU 0\.0 %, computed limit 0\.002 ms\n", ended.err)
    assert "| achieved | MFU | denoising, computed limit | forwards |" in page
    assert "MFU is of the card's dense 16-bit peak, 989 TFLOP/s by its data sheet." in page
    assert "on this card at 800 TFLOP/s" in page


def test_driver_says_its_version_in_two_ways() -> None:
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC"
    opened = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)"
    )
    assert driver_version(closed) == "550.54.15"
    assert driver_version(opened) == "570.86.15"
    assert driver_version("") is None


def test_measured_numbers_have_three_digits() -> None:
    assert [short_time(s) for s in (0.000123, 0.0123, 0.0931, 0.749, 5.3821)] == [
        *("0.123 ms", "12.3 ms", "93.1 ms", "749 ms", "5.38 s"),
    ]
    assert [scaled(n, "FLOP/s") for n in (594.2e12, 12.34e9, 5e3)] == [
        *("594 TFLOP/s", "12.3 GFLOP/s", "0.005 MFLOP/s"),
    ]
