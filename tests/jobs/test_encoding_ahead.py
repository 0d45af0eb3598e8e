"""Texts of the next batch are encoded while pixels of this one travel; the pixels stay the same."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cli_calls import CommandLine
from stages import load, make_stages

from jobs import batch_stages, worker
from jobs.batch_images import BatchImages
from jobs.batch_stages import BatchStages
from jobs.canaries import CanaryReport
from jobs.config import SamplingConfig
from jobs.image_faults import ComingPixels
from jobs.plan import Sample
from jobs.text_features import TextFeatures
from jobs.worker import GenerationWorker
from zimage_core import ZImagePipeline


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of a device, and what was waited for, in order."""
    found: list[str] = []

    def noted(owner: Any, name: str, words: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            texts = " ".join(args[1]) if words == "encode" else ""
            found.append(f"{words} {texts}".strip())
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    noted(TextFeatures, "encode", "encode")
    noted(ZImagePipeline, "denoise", "denoise")
    noted(ZImagePipeline, "decode", "decode")
    noted(ComingPixels, "wait", "wait")
    return found


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def stages(said: list[str]) -> BatchStages:
    sampling = SamplingConfig(width=32, height=32, num_inference_steps=1)
    return make_stages(load(), sampling, log=said.append)


def batch(*texts: str) -> list[Sample]:
    return [Sample(ord(text), 0, text, "", seed=ord(text), width=32, height=32) for text in texts]


def make(stages: BatchStages, now: Sequence[Sample], following: Sequence[Sample] = ()) -> Any:
    return np.stack(stages.make(now, BatchImages(), following))  # type: ignore[arg-type]


def test_the_next_batch_is_encoded_before_pixels_are_waited_for(
    stages: BatchStages, happened: list[str]
) -> None:
    one, two = batch("a", "b"), batch("c", "d")
    alone = [make(stages, one), make(stages, two)]
    happened.clear()
    following = [make(stages, one, two), make(stages, tuple(two))]
    assert happened == [
        *("encode a b", "denoise", "decode", "encode c d", "wait"),
        *("denoise", "decode", "wait"),
    ]
    assert np.array_equal(alone, following)


def test_a_batch_that_does_not_come_is_forgotten(stages: BatchStages, happened: list[str]) -> None:
    one, two, three = batch("a"), batch("b", "c"), batch("c")
    make(stages, one, two)
    pixels = make(stages, three)  # a sample of it alone, say
    make(stages, two)
    assert [words for words in happened if "encode" in words] == [
        *("encode a", "encode b c", "encode c", "encode b c")
    ]
    assert np.array_equal(pixels, make(stages, three))


def test_what_cannot_be_encoded_ahead_is_met_again_by_its_own_batch(
    stages: BatchStages, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, emptied = TextFeatures.encode, []

    def fail(self: TextFeatures, texts: Sequence[str]) -> Any:
        if "b" in texts:
            raise torch.OutOfMemoryError("no memory")
        return encode(self, texts)

    monkeypatch.setattr(TextFeatures, "encode", fail)
    monkeypatch.setattr(batch_stages, "empty_cache", lambda: emptied.append(True))
    assert make(stages, batch("a"), batch("b")).shape == (1, 32, 32, 3)
    assert said == ["samples (98,) not encoded ahead: OutOfMemoryError: no memory"]
    assert emptied == [True]
    with pytest.raises(torch.OutOfMemoryError):
        make(stages, batch("b"))


def of_job(happened: Sequence[str]) -> list[str]:
    """Without the canary's."""
    found = [words for words in happened if words.startswith(("encode t", "wait"))]
    return found[found.index("encode t0 t1") :]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_run_on_a_gpu_encodes_all_but_the_first_batch_of_a_shard_ahead(
    zimage: CommandLine, happened: list[str], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setattr(worker, "works_beside_host", lambda device_type: ahead)
    generator = zimage.write_generator("return Prompt(text=f't{index if index != 6 else 1 / 0}')")
    flags = ["--set", f"prompts.generator={generator}", "--set", "sampling.batch_size=2"]
    zimage.run(*flags, "--set", "output.shard_size=4", code=3)
    t01, t23, t45, t7 = "encode t0 t1", "encode t2 t3", "encode t4 t5", "encode t7"
    assert of_job(happened) == (
        [t01, t23, "wait", "wait", t45, "wait", t7, "wait"]
        if ahead
        else [t01, "wait", t23, "wait", t45, "wait", t7, "wait"]
    )


def test_where_a_sample_may_kill_its_worker_no_other_is_begun(
    zimage: CommandLine, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "works_beside_host", lambda device_type: True)
    run = GenerationWorker.run
    monkeypatch.setattr(
        GenerationWorker, "run", lambda self, lease: run(self, replace(lease, isolate=True))
    )
    generator = zimage.write_generator("return Prompt(text=f't{index}')")
    zimage.run("--set", f"prompts.generator={generator}", "--count", 2, code=0)
    assert [words for words in happened if words != "denoise"][-6:] == [
        *("encode t0", "decode", "wait", "encode t1", "decode", "wait")
    ]


def test_of_a_batch_in_parts_the_last_encodes_ahead(
    zimage: CommandLine, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "works_beside_host", lambda device_type: True)
    denoise = ZImagePipeline.denoise

    def fail(self: ZImagePipeline, prompts: Sequence[Any], **options: Any) -> Any:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("no memory")
        return denoise(self, prompts, **options)

    generator = zimage.write_generator("return Prompt(text=f't{index}')")
    flags = ["--set", f"prompts.generator={generator}", "--set", "sampling.batch_size=2"]
    monkeypatch.setattr(ZImagePipeline, "denoise", fail)
    monkeypatch.setattr(worker, "fly_canary", lambda *_: CanaryReport(0.0, 1.0))
    zimage.run(*flags, "--count", 4, "--set", "output.shard_size=4", code=0)
    assert of_job(happened) == [
        *("encode t0 t1", "encode t0", "wait", "encode t1", "encode t2 t3", "wait"),
        *("encode t2", "wait", "encode t3", "wait"),
    ]
