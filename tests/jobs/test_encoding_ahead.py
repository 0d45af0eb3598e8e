"""Texts of the next batch are encoded while pixels of this one travel; the pixels stay the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_calls import CommandLine

from jobs import batch_stages
from jobs.batch_images import BatchImages
from jobs.batch_stages import BatchStages
from jobs.config import SamplingConfig
from jobs.image_faults import ComingPixels
from jobs.plan import Sample
from jobs.text_features import TextFeatures
from zimage_core import LoraSwitcher, ZImagePipeline, load_from_local_dir

TINY = Path(__file__).parents[2] / "data/checkpoints/z-image-tiny"


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
    pipeline = ZImagePipeline(**load_from_local_dir(TINY, device="cpu", dtype=torch.float32))
    return BatchStages(
        pipeline,
        loras=LoraSwitcher(pipeline.transformer, {}),
        scales={},
        sampling=SamplingConfig(width=32, height=32, num_inference_steps=1),
        images_root=None,
        on_step=lambda _: None,
        log=said.append,
    )


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


def test_a_run_encodes_each_batch_once_and_all_but_the_first_of_a_shard_ahead(
    zimage: CommandLine, happened: list[str]
) -> None:
    generator = zimage.write_generator("return Prompt(text=f't{index}')")
    flags = ["--set", f"prompts.generator={generator}", "--set", "sampling.batch_size=2"]
    zimage.run(*flags, "--set", "output.shard_size=4", code=0)
    of_job = [words for words in happened if words.startswith(("encode t", "wait"))][-8:]
    assert of_job == [
        *("encode t0 t1", "encode t2 t3", "wait", "wait"),
        *("encode t4 t5", "encode t6 t7", "wait", "wait"),
    ]
