"""The rows of a benchmark: what each stage took, or why it has no time, beside computed limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jobs.device import DeviceError, empty_cache, is_device_failure, is_out_of_memory
from jobs.progress_bar import ProgressBar
from jobs.roofline import CARDS, PUBLISHED, TransformerSize, card_named, denoising_flops
from jobs.stage_times import Denoised, StageTimes, Timing
from jobs.writers import WRITERS
from zimage_core import AutoencoderKL, ZImagePipeline
from zimage_core.compilation import CompileError, compile_blocks
from zimage_core.config import AutoencoderConfig
from zimage_core.empty_module import make_empty

Status = Literal["ok", "out_of_memory", "failed"]

_Result = TypeVar("_Result")


class Configuration(NamedTuple):
    """How the transformer runs."""

    attention: str
    compile: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage on one batch. Keys of `rows` in docs/cli.md, where they are described."""

    stage: str
    pixels: int | None = None
    attention: str | None = None
    compile: bool | None = None
    status: Status = "ok"
    reason: str | None = None
    runs: int = 0
    median_seconds: float | None = None
    lowest_seconds: float | None = None
    highest_seconds: float | None = None
    cpu_seconds: float | None = None
    images_per_second: float | None = None
    peak_bytes: int | None = None
    forwards: int | None = None
    flops: float | None = None
    flops_per_second: float | None = None
    mfu: float | None = None
    limit_seconds: float | None = None
    difference: float | None = None
    file_bytes: int | None = None


class BenchRows:
    """Times stages and keeps their rows.

    Args:
        stages: times them.
        pipeline: theirs.
        card: a key of `CARDS` to compare with; None for none.
        num_stages: that will be timed, for the progress bar.
        on_row: called with each row.
    """

    def __init__(
        self,
        stages: StageTimes,
        pipeline: ZImagePipeline,
        *,
        card: str | None,
        num_stages: int,
        on_row: Callable[[Row], None],
    ) -> None:
        self.rows: list[Row] = []
        self.compile_seconds: dict[str, float] = {}
        self._stages = stages
        self._pipeline = pipeline
        self._size = TransformerSize.of(pipeline.transformer.config)
        self._card = card
        self._on_row = on_row
        self._progress = ProgressBar("measuring", num_stages, "stage")
        self._decoded: set[int] = set()
        self._latents: dict[int, Tensor] = {}  # of the first configuration, by size

    @property
    def num_measured(self) -> int:
        """Rows with a time."""
        return sum(row.status == "ok" for row in self.rows)

    @property
    def is_published_size(self) -> bool:
        """Whether the transformer has the numbers of the published ones."""
        return self._size == PUBLISHED

    def close(self) -> None:
        """End the progress bar."""
        self._progress.__exit__(None, None, None)

    def configure(self, configuration: Configuration, device: torch.device) -> str | None:
        """Make the transformer run in a way; or the reason why it cannot."""
        transformer = self._pipeline.transformer
        transformer.set_attention_backend(configuration.attention)
        if not configuration.compile:
            return None
        started = time.perf_counter()
        try:
            compile_blocks(transformer, device)
        except CompileError as error:
            return str(error).partition("; load with")[0]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return f"out of memory: {_first_line(error)}"
        self.compile_seconds[configuration.attention] = time.perf_counter() - started
        return None

    def text_encoding(self) -> None:
        """Time what depends on neither size nor configuration."""
        timing = self._attempt(("text_encoding",), {}, self._stages.text_encoding)
        if timing is not None:
            self._add(timing, stage="text_encoding")

    def size(self, configuration: Configuration, side: int) -> None:
        """Time the stages of one size in one configuration."""
        where: dict[str, Any] = {"pixels": side, **configuration._asdict()}
        empty_cache()  # what other sizes left in pieces
        denoised = self._attempt(("step", "denoise"), where, lambda: self._stages.denoise(side))
        if denoised is not None:
            self._add_denoised(denoised, side, where)
        if side not in self._decoded:
            self._decoded.add(side)
            latents = self._stages.noise(side) if denoised is None else denoised.latents
            self._decode(latents, side)
            del latents
        del denoised
        timing = self._attempt(("end_to_end",), where, lambda: self._stages.end_to_end(side))
        if timing is not None:
            rate = len(self._stages.prompts) / timing.median
            self._add(timing, stage="end_to_end", images_per_second=rate, **where)

    def _add_denoised(self, denoised: Denoised, side: int, where: dict[str, Any]) -> None:
        batch, caption = len(self._stages.prompts), self._stages.caption_tokens
        latents = denoised.latents.cpu()
        first = self._latents.setdefault(side, latents)
        self._add(
            denoised.step,
            stage="step",
            flops=batch * self._size.step_flops(side, side, caption),
            **where,
        )
        self._add(
            denoised.whole,
            stage="denoise",
            flops=batch * denoising_flops(self._size, side, side, denoised.forwards, caption),
            forwards=denoised.forwards,
            difference=float(torch.dist(latents, first) / first.norm()),
            **where,
        )

    def _decode(self, latents: Tensor, side: int) -> None:
        where: dict[str, Any] = {"pixels": side}
        decoded = self._attempt(("decode",), where, lambda: self._stages.decode(latents))
        if decoded is None:
            status = self.rows[-1].status
            for form in WRITERS:
                self._keep(Row(stage=form, status=status, reason="no pixels to encode", **where))
                self._progress.update()
            return
        pixels, timing = decoded
        flops = decoder_flops(self._pipeline.vae.config, latents.shape)
        self._add(timing, stage="decode", flops=flops, **where)
        for form in WRITERS:
            num_bytes, timing = self._stages.image_encoding(form, pixels)
            self._progress.update()
            self._add(timing, stage=form, file_bytes=num_bytes, **where)

    def _attempt(
        self, stages: tuple[str, ...], where: dict[str, Any], measure: Callable[[], _Result]
    ) -> _Result | None:
        """What `measure` returns; None where it failed, which the rows of `stages` then say.

        Raises:
            DeviceError: nothing more can be measured in this process.
        """
        try:
            return measure()
        except (RuntimeError, MemoryError) as error:
            status: Status = "out_of_memory" if is_out_of_memory(error) else "failed"
            reason = f"{type(error).__name__}: {_first_line(error)}"
            fatal = is_device_failure(error)
        finally:
            self._progress.update()
        # Here the error is gone, and with it the frames that hold tensors.
        for stage in stages:
            self._keep(Row(stage=stage, status=status, reason=reason, **where))
        if fatal:
            raise DeviceError(reason)
        empty_cache()
        return None

    def _add(self, timing: Timing, **values: Any) -> None:
        self._keep(timed_row(timing, self._card, **values))

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self._on_row(row)


def timed_row(
    timing: Timing, card: str | None, *, flops: float | None = None, **values: Any
) -> Row:
    """The row of a stage that was timed.

    Args:
        timing: of the whole batch.
        card: see `BenchRows`.
        flops: operations of the whole batch, where they are known.
        values: the row's other fields.
    """
    rate = None if flops is None else flops / timing.median
    return Row(
        runs=len(timing.seconds),
        median_seconds=timing.median,
        lowest_seconds=min(timing.seconds),
        highest_seconds=max(timing.seconds),
        cpu_seconds=timing.cpu_median,
        peak_bytes=timing.peak_bytes,
        flops=flops,
        flops_per_second=rate,
        mfu=None if card is None or rate is None else rate / CARDS[card].peak,
        limit_seconds=None if card is None or flops is None else flops / CARDS[card].floor,
        **values,
    )


def compared_with(
    device_name: str, device_type: str, dtype: torch.dtype
) -> tuple[str | None, str | None]:
    """The key in `CARDS` of what measurements are compared with, or why there is nothing."""
    if device_type != "cuda":
        return None, f"no peak is known for {'a CPU' if device_type == 'cpu' else device_type}"
    if dtype == torch.float32:
        return None, "the peaks that are known are of 16 bits, and this was float32"
    card = card_named(device_name)
    if card is None:
        return None, f"the peak of {device_name!r} is not known; known are {', '.join(CARDS)}"
    return card, None


def decoder_flops(config: AutoencoderConfig, latents: Sequence[int]) -> float:
    """Operations of the decoder: PyTorch's count of them, on tensors without memory.

    Args:
        config: of the autoencoder.
        latents: their shape, (B, F, h, w).
    """
    module = make_empty(AutoencoderKL, config)
    assert isinstance(module, AutoencoderKL)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.decode(torch.empty(tuple(latents), device="meta"))
    return float(counter.get_total_flops())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
