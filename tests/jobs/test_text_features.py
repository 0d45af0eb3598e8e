"""Text features are kept only where that changes no bit, in whatever order batches come."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cli_calls import CommandLine
from stages import load, make_stages
from torch import Tensor

from jobs.batch_images import BatchImages
from jobs.config import SamplingConfig
from jobs.plan import Sample
from jobs.text_features import TextFeatures
from zimage_core import ZImagePipeline
from zimage_core.upcasting import in_float32

LONG = "portrait avatar of a smiling woman with curly red hair and round glasses " * 3
BATCHES = [
    ["a red apple", "a bowl of soup"],
    ["", ""],
    ["a red apple"],
    ["", "ugly"],
    ["ugly"],
    [LONG, "a red apple", LONG],
    [LONG, LONG],
    ["", "", ""],
]


@pytest.fixture(scope="module")
def pipeline() -> ZImagePipeline:
    return load()


@pytest.fixture
def asked(pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each call of the pipeline's `encode`."""
    calls: list[list[str]] = []
    encode = ZImagePipeline.encode

    def count(self: Any, prompts: Sequence[str], **options: Any) -> list[Tensor]:
        calls.append(list(prompts))
        return encode(self, prompts, **options)

    monkeypatch.setattr(ZImagePipeline, "encode", count)
    return calls


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_bit_is_as_if_nothing_were_kept(pipeline: ZImagePipeline) -> None:
    for batches in (BATCHES, BATCHES[::-1], BATCHES * 2):
        features = TextFeatures(pipeline, 64)
        for batch in batches:
            alone = pipeline.encode(batch, max_sequence_length=64)
            assert equal(features.encode(batch), alone), batch


def test_what_is_encoded_alone_is_encoded_once(
    pipeline: ZImagePipeline, asked: list[list[str]]
) -> None:
    features = TextFeatures(pipeline, 512)
    for _ in range(3):
        for batch in (["", ""], ["a red apple", ""], ["ugly"], [""]):
            first, *others = features.encode(batch)
            assert all(other is first for other in others) or "a red apple" in batch
    together = ["a red apple", ""]
    assert asked == [[""], together, ["ugly"], together, together]


def test_no_more_than_a_few_are_kept(pipeline: ZImagePipeline, asked: list[list[str]]) -> None:
    features = TextFeatures(pipeline, 512)
    for i in range(40):
        features.encode([str(i)])
        features.encode(["the negative prompt of all"])  # in use, so never the one to go
    assert asked.count(["the negative prompt of all"]) == 1
    assert len(asked) == 41
    assert len(features._kept) == 8
    features.encode(["0"])
    assert len(asked) == 42


def test_in_float32_nothing_is_taken_from_before_and_nothing_is_left_behind() -> None:
    pipeline = load(dtype=torch.bfloat16)
    features = TextFeatures(pipeline, 512)
    (before,) = features.encode(["ugly"])
    with in_float32(pipeline.text_encoder):
        (wide,) = features.encode_anew(["ugly"])
    (after,) = features.encode(["ugly"])
    assert before.dtype == after.dtype == torch.bfloat16 and torch.equal(before, after)
    assert wide.dtype == torch.float32
    assert not torch.equal(wide, before.float())


def test_a_sample_that_is_made_again_is_encoded_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(dtype=torch.bfloat16)
    given = []

    def denoise(self: Any, prompts: list[Tensor], **options: Any) -> Tensor:
        given.append((prompts[0].dtype, options["negative_prompt_embeds"][0].dtype))
        return torch.full(self.latents_shape(1, 32, 32), float("nan"))

    monkeypatch.setattr(ZImagePipeline, "denoise", denoise)
    stages = make_stages(pipeline, SamplingConfig(width=32, height=32, guidance_scale=2.0))
    sample = Sample(0, 0, "a red apple", "ugly", seed=0, width=32, height=32)
    for _ in range(2):
        stages.make_in_float32(sample, BatchImages())
    assert given == [(torch.bfloat16,) * 2, (torch.float32,) * 2] * 2


def test_a_guided_job_has_the_same_pixels_whole_and_in_parts(zimage: CommandLine) -> None:
    guided = ["--set", "sampling.guidance_scale=3.0", "--set", "sampling.batch_size=2"]
    generator = zimage.write_generator(
        "return Prompt(text=f'face {index}', negative_text=('', 'ugly', None)[index % 3])"
    )
    generated = ["--set", f"prompts.generator={generator}"]
    zimage.run(*guided, *generated, "--output", "whole", code=0)
    for count in (4, 8):  # whole shards, so that the batches are the same
        zimage.run(*guided, *generated, "--count", count, "--output", "parts", code=0)
    made = [
        [(row["batch"], row["pixels_sha256"]) for row in zimage.rows(output)]
        for output in ("whole", "parts")
    ]
    assert made[0] == made[1]
    assert len({pixels for _, pixels in made[0]}) == 8
