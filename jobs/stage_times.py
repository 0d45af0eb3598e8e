"""How long the stages of making images take on a device, and how much memory they need at most.

Every stage is run once without a clock, and then several times with one. The device is waited for
before and after each of these runs; steps are timed inside of a denoising run that nothing waits
in, on CUDA by events of the stream.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from jobs.image_faults import ImageFault, to_pixels
from jobs.stage_clock import device_mark, seconds_between
from jobs.writers import WRITERS, ImageFormat, Pixels
from zimage_core import ZImagePipeline
from zimage_core.patchify import padded_length

PROMPT = (
    "a portrait photograph of a fisherman in a yellow raincoat on a wooden pier at dusk, grey "
    "beard, calm smile, soft light, harbour with small boats behind him, number {:04d}"
)
"""Every image of a batch has a number of its own, since equal prompts are encoded once."""
WARM_UP_RUNS = 1
SEED = 42

_Result = TypeVar("_Result")


class UnusableImageError(RuntimeError):
    """What was made is no image: a speed of it means nothing."""


@dataclass(frozen=True)
class Timing:
    """Runs of a stage on one batch.

    Attributes:
        seconds: of each run, or of each step of all runs.
        cpu_seconds: of this process, of each run, all threads together; empty for steps.
        peak_bytes: of CUDA memory while the runs lasted, weights included; None elsewhere.
    """

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float | None:
        """Of the CPU seconds; None for steps."""
        return statistics.median(self.cpu_seconds) if self.cpu_seconds else None


class Stopwatch:
    """Times runs on a device.

    Args:
        device: where they compute.
        repeats: how often each is timed.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device = device
        self._repeats = repeats

    def time(
        self, run: Callable[[], _Result], collect: Callable[[], None] | None = None
    ) -> tuple[_Result, Timing]:
        """Time a function, which is called `WARM_UP_RUNS` times more than it is timed.

        Args:
            run: the function.
            collect: called after each timed call, when the device is done.

        Returns:
            What its last call returned, and the times.
        """
        is_cuda = self._device.type == "cuda"
        for _ in range(WARM_UP_RUNS):
            run()
        self._wait()
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        seconds, cpu_seconds = [], []
        results: list[_Result] = []
        for _ in range(self._repeats):
            results.clear()  # so that no run finds less room than the first
            cpu, started = time.process_time(), time.perf_counter()
            results.append(run())
            self._wait()
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu)
            if collect is not None:
                collect()
        peak = int(torch.cuda.max_memory_allocated(self._device)) if is_cuda else None
        return results[0], Timing(tuple(seconds), tuple(cpu_seconds), peak)

    def mark(self) -> Any:
        """A moment of the device's work; on CUDA nothing waits for it."""
        on_cuda = self._device.type == "cuda"
        if not on_cuda:
            self._wait()
        return device_mark(on_cuda)

    def between(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from each mark to the next, once the device is done."""
        return [seconds_between(a, b) for a, b in itertools.pairwise(marks)]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


@dataclass(frozen=True)
class Denoised:
    """What a denoising run gave, and its times.

    Attributes:
        latents: (B, F, h, w) float32 on the device.
        whole: the times of all steps and what comes before them.
        step: from the end of one step to the end of the next: a forward and an Euler step.
        forwards: of the transformer, in each run.
    """

    latents: Tensor
    whole: Timing
    step: Timing
    forwards: int


class StageTimes:
    """Times the stages on one batch of fixed prompts and seeds.

    Args:
        pipeline: the models; attention and compiling as they are when a stage is timed.
        watch: times.
        batch_size: images made at once.
        steps: of denoising, at least 2, since a step is timed from the end of the one before.
    """

    def __init__(
        self, pipeline: ZImagePipeline, watch: Stopwatch, *, batch_size: int, steps: int
    ) -> None:
        self._pipeline = pipeline
        self._watch = watch
        self._steps = steps
        self.prompts = fixed_prompts(pipeline, batch_size)
        (self.caption_tokens,) = pipeline.caption_lengths(self.prompts[:1])
        self._features: list[Tensor] = []

    def text_encoding(self) -> Timing:
        """Prompts to text features, tokenizer included."""
        self._features, timing = self._watch.time(self._encode)
        return timing

    def denoise(self, side: int) -> Denoised:
        """Text features to latents of square images.

        Raises:
            UnusableImageError: latents are not finite.
        """
        if not self._features:
            self._features = self._encode()
        marks: list[Any] = []
        steps: list[float] = []
        forwards: list[int] = []

        def run() -> Tensor:
            marks.clear()
            forwards.append(0)
            return self._denoise(self._features, side, lambda _: marks.append(self._watch.mark()))

        def count(*_: object) -> None:
            forwards[-1] += 1

        hook = self._pipeline.transformer.layers[0].register_forward_pre_hook(count)
        try:
            latents, whole = self._watch.time(run, lambda: steps.extend(self._watch.between(marks)))
        finally:
            hook.remove()
        assert set(forwards) == {self._steps}, (
            f"transformer forwards of each run: {forwards}; asked for: {self._steps} steps"
        )
        if not torch.isfinite(latents).all():
            raise UnusableImageError("the latents are not finite")
        return Denoised(latents, whole, Timing(tuple(steps), (), whole.peak_bytes), self._steps)

    def decode(self, latents: Tensor) -> tuple[list[Pixels], Timing]:
        """Latents to 8-bit pixels in the host's memory.

        Raises:
            UnusableImageError: an image is not finite or of one colour.
        """
        return self._watch.time(lambda: self._decode(latents))

    def image_encoding(self, form: ImageFormat, pixels: Sequence[Pixels]) -> tuple[int, Timing]:
        """Pixels to files' bytes, as a job writes them, on one thread; also the bytes' number."""
        return self._watch.time(lambda: sum(len(WRITERS[form].encode(each)) for each in pixels))

    def end_to_end(self, side: int) -> Timing:
        """Prompts to the bytes of PNG files, one stage after the other.

        Raises:
            UnusableImageError: an image is not finite or of one colour.
        """

        def run() -> None:
            for each in self._decode(self._denoise(self._encode(), side, None)):
                WRITERS["png"].encode(each)

        _, timing = self._watch.time(run)
        return timing

    def noise(self, side: int) -> Tensor:
        """Latents to decode where none could be made."""
        shape = self._pipeline.latents_shape(len(self.prompts), side, side)
        return torch.randn(shape, generator=_generators(1)[0]).to(self._pipeline.device)

    def _encode(self) -> list[Tensor]:
        return self._pipeline.encode(list(self.prompts))

    def _denoise(
        self, features: Sequence[Tensor], side: int, on_step: Callable[[int], None] | None
    ) -> Tensor:
        return self._pipeline.denoise(
            features,
            height=side,
            width=side,
            num_inference_steps=self._steps,
            generators=_generators(len(features)),
            on_step=on_step,
        )

    def _decode(self, latents: Tensor) -> list[Pixels]:
        pixels = []
        for image in to_pixels(self._pipeline.decode(latents)):
            if isinstance(image, ImageFault):
                raise UnusableImageError(image.message)
            pixels.append(image)
        return pixels


def fixed_prompts(pipeline: ZImagePipeline, number: int) -> list[str]:
    """So many prompts, no two equal, whose captions are padded to one length.

    So a batch needs one forward of the transformer for each step, whatever its tokenizer.

    Raises:
        ValueError: there are not as many.
    """
    candidates = [PROMPT.format(i) for i in range(1, 4 * number + 1)]
    lengths = [padded_length(length) for length in pipeline.caption_lengths(candidates)]
    chosen = [p for p, length in zip(candidates, lengths, strict=True) if length == lengths[0]]
    if len(chosen) < number:
        raise ValueError(
            f"of {len(candidates)} prompts only {len(chosen)} have captions of one padded length"
        )
    return chosen[:number]


def _generators(number: int) -> list[Generator]:
    return [Generator("cpu").manual_seed(SEED + i) for i in range(number)]
