"""What happens to a batch on the device: encode, add images, denoise, decode.

In this order, one batch after the other; or, where the models take turns on a device that is too
small for all of them (`model.offload: phase`), one stage after the other for all batches of a
lease, so that weights are moved twice for a shard and not twice for a batch. The numbers are the
same: a stage sees the same batches in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor

from jobs.batch_images import BatchImages, read_images
from jobs.config import SamplingConfig
from jobs.device import empty_cache, is_device_failure, is_out_of_memory
from jobs.edit_features import EditFeatures
from jobs.image_faults import ComingPixels, ImageFault
from jobs.plan import Sample
from jobs.stage_clock import StageClock
from jobs.text_features import TextFeatures
from jobs.writers import Pixels
from zimage_core import LoraSwitcher, ZImagePipeline
from zimage_core.editing import Edit
from zimage_core.entries import Condition
from zimage_core.offload import compute_device, use
from zimage_core.upcasting import in_float32


@dataclass
class Draft:
    """A batch between two stages."""

    samples: Sequence[Sample]
    prompts: list[Condition] = field(default_factory=list)
    negatives: list[Condition] | None = None
    generators: list[Generator] = field(default_factory=list)
    image_latents: Tensor | None = None
    latents: Tensor | None = None

    def wait(self) -> None:
        """Leave the device to others until the next stage."""
        self.prompts = _to_host(self.prompts)
        self.negatives = None if self.negatives is None else _to_host(self.negatives)
        if self.image_latents is not None:
            self.image_latents = self.image_latents.cpu()
        if self.latents is not None:
            self.latents = self.latents.cpu()


class BatchStages:
    """Runs batches through one pipeline.

    Args:
        pipeline: the models.
        loras: the adapters of its transformer.
        scales: strength of each adapter, by name.
        sampling: the job's.
        images_root: of the images that prompts bring.
        takes_pictures: whether they are edited; else one is started from.
        clock: times the stages.
        on_step: called with every step of work.
        log: called with a line for the worker's log.
    """

    def __init__(
        self,
        pipeline: ZImagePipeline,
        *,
        loras: LoraSwitcher,
        scales: Mapping[str, float],
        sampling: SamplingConfig,
        images_root: Path | None,
        on_step: Callable[[int], None],
        log: Callable[[str], None],
        takes_pictures: bool = False,
        clock: StageClock | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._loras = loras
        self._scales = scales
        self._sampling = sampling
        self._features = TextFeatures(pipeline, sampling.max_sequence_length)
        self._edits: EditFeatures | None = None
        if takes_pictures:
            self._edits = EditFeatures(pipeline, sampling.max_sequence_length)
        self._clock = StageClock("cpu") if clock is None else clock
        self._images_root = images_root
        self._on_step = on_step
        self._log = log
        self._denoised: dict[tuple[int, ...], Draft] = {}
        self._encoded_ahead: Draft | None = None

    def read(self, batch: Sequence[Sample]) -> BatchImages:
        """What the samples of a batch are made from; of pictures what is not encoded already."""
        return self._read(batch, anew=False)

    def make(
        self, batch: Sequence[Sample], images: BatchImages, following: Sequence[Sample] = ()
    ) -> list[Pixels | ImageFault]:
        """Pixels uint8 (H, W, 3) of each sample of a batch, or why they are no image.

        Args:
            batch: made together.
            images: what they are made from.
            following: the batch that will be asked for next, if any, whose texts are encoded after
                this batch, so that the device is busy while the host takes the pixels.
        """
        draft = self._denoised.pop(_indices(batch), None)
        if draft is None:
            draft = self._begin(batch)
            self._add_images(draft, images)
            self._denoise(draft)
        coming = self._decode(draft)
        self._encode_ahead(following)
        return self._arrived(coming)

    def make_in_float32(self, sample: Sample, images: BatchImages) -> Pixels | ImageFault:
        """Make a sample alone once more, in float32 where 16 bits may have been too few.

        First only decoding is done in float32, which needs little memory; and where the latents
        are not finite, or that is no image either, every stage. What comes of it depends on the
        sample and the kind of device, not on the batch that it was in before.

        Raises:
            UpcastError: the models cannot be run in float32 (8-bit weights, offload "block").
            torch.OutOfMemoryError: there is no room for a model in float32; weights are as before.
        """
        draft = Draft([sample])
        self._encode(draft)
        self._add_images(draft, images)
        self._denoise(draft)
        assert draft.latents is not None
        models = self._pipeline
        if torch.isfinite(draft.latents).all():
            with in_float32(models.vae):
                (image,) = self._arrived(self._decode(draft))
            if not isinstance(image, ImageFault):
                return image
        draft = Draft([sample])
        with in_float32(models.text_encoder):
            self._encode(draft, anew=True)
        if sample.edits:
            self._add_pictures(draft, self._read([sample], anew=True), anew=True)
        elif sample.init_image is not None:
            with in_float32(models.vae):
                self._add_images(draft, images)
        with in_float32(models.transformer):  # its adapters are in it since the first time
            self._denoise(draft)
        with in_float32(models.vae):
            (image,) = self._arrived(self._decode(draft))
        return image

    def is_denoised(self, batch: Sequence[Sample]) -> bool:
        """Whether `make` has only to decode a batch, thanks to `denoise_all`."""
        return _indices(batch) in self._denoised

    def denoise_all(
        self,
        batches: Iterable[Sequence[Sample]],
        stop: Callable[[], bool],
        begin: Callable[[Sequence[Sample]], bool],
    ) -> None:
        """Take batches up to the last stage, all of them through one before the next begins.

        A batch that fails is left out: `make` tries it again, where its error has consequences.

        Args:
            batches: as `make` will be asked for them.
            stop: whether to begin no further batch; those that are denoised can be made.
            begin: asked just before a batch is denoised: false if another worker makes it.
        """
        self._denoised.clear()
        drafts = [Draft(batch) for batch in batches]
        for stage in (self._encode, self._read_and_add_images, self._denoise):
            for draft in list(drafts):
                if stop():
                    return
                if stage == self._denoise and not begin(draft.samples):
                    continue
                try:
                    stage(draft)
                except Exception as error:
                    if is_device_failure(error):
                        raise
                    self._put_off(draft, error, "left for later")
                    drafts.remove(draft)
                    continue
                draft.wait()
                if draft.latents is not None:
                    self._denoised[_indices(draft.samples)] = draft

    def _begin(self, batch: Sequence[Sample]) -> Draft:
        """A batch with its texts encoded, now or ahead."""
        draft, self._encoded_ahead = self._encoded_ahead, None
        if draft is None or list(draft.samples) != list(batch):
            draft = Draft(batch)
            self._encode(draft)
        return draft

    def _encode_ahead(self, batch: Sequence[Sample]) -> None:
        """Encode the texts of a batch; where that fails, `make` tries again and says so."""
        if not batch:
            return
        draft = Draft(batch)
        try:
            self._encode(draft)
        except Exception as error:  # noqa: BLE001 - of another batch, which meets it again
            self._put_off(draft, error, "not encoded ahead")
        else:
            self._encoded_ahead = draft

    def _put_off(self, draft: Draft, error: Exception, what: str) -> None:
        """Say that a stage of a batch failed for now, and free what a second try may need."""
        if is_out_of_memory(error):
            empty_cache()
        words = f"{type(error).__name__}: {error}"
        self._log(f"samples {_indices(draft.samples)} {what}: {words}")

    def _encode(self, draft: Draft, *, anew: bool = False) -> None:
        batch = draft.samples
        with self._clock.stage("text"):
            draft.prompts = self._encoded(draft, [s.prompt for s in batch], anew)
            if self._sampling.guidance_scale > 0:
                draft.negatives = self._encoded(draft, [s.negative_prompt for s in batch], anew)
        # A generator draws the latents of an image to start from, and the noise after them.
        draft.generators = [torch.Generator("cpu").manual_seed(s.seed) for s in batch]
        self._on_step(0)

    def _encoded(self, draft: Draft, texts: Sequence[str], anew: bool) -> list[Condition]:
        if self._edits is not None:
            return list(self._edits.texts(texts, draft.samples, anew=anew))
        encode = self._features.encode_anew if anew else self._features.encode
        return list(encode(texts))

    def _read(self, batch: Sequence[Sample], *, anew: bool) -> BatchImages:
        edits = None if anew else self._edits
        return read_images(
            batch,
            self._images_root,
            self._on_step,
            multiple=self._pipeline.size_multiple,
            encoded=lambda key: None if edits is None else edits.encoded(key),
        )

    def _read_and_add_images(self, draft: Draft) -> None:
        if not any(sample.images for sample in draft.samples):
            return
        images = self.read(draft.samples)
        if images.faults:  # a smaller batch then, which only `make` can see to
            raise ValueError("; ".join(images.faults.values()))
        self._add_images(draft, images)

    def _add_images(self, draft: Draft, images: BatchImages) -> None:
        starts = images.starts_of(draft.samples)
        if starts is not None:
            with self._clock.stage("pictures"):
                draft.image_latents = self._pipeline.encode_image(starts, draft.generators)
        self._add_pictures(draft, images)

    def _add_pictures(self, draft: Draft, images: BatchImages, *, anew: bool = False) -> None:
        """Give a draft's texts the pictures that they are about; so its negative ones."""
        if self._edits is None or not any(sample.pictures for sample in draft.samples):
            return
        add = self._edits.with_pictures_in_float32 if anew else self._edits.with_pictures
        conditions = [*draft.prompts, *(draft.negatives or ())]
        edits = [condition for condition in conditions if isinstance(condition, Edit)]
        samples = [*draft.samples] * (len(edits) // len(draft.samples))
        with self._clock.stage("pictures"):
            whole = add(edits, samples, images)
        draft.prompts = [*whole[: len(draft.prompts)]]
        if draft.negatives is not None:
            draft.negatives = [*whole[len(draft.prompts) :]]
        self._on_step(0)

    def _denoise(self, draft: Draft) -> None:
        first, sampling = draft.samples[0], self._sampling
        self._merge_loras(first.loras)
        with self._clock.stage("denoise"):
            draft.latents = self._pipeline.denoise(
                draft.prompts,
                height=first.height,
                width=first.width,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                negative_prompt_embeds=draft.negatives,
                generators=draft.generators,
                image_latents=draft.image_latents,
                strength=sampling.strength,
                cfg_normalization=sampling.cfg_normalization,
                cfg_truncation=sampling.cfg_truncation,
                cache=sampling.cache,
                on_step=self._on_step,
            )

    def _decode(self, draft: Draft) -> ComingPixels:
        assert draft.latents is not None
        # Scaled where they were made: a division has other last bits elsewhere.
        with self._clock.stage("decode"):
            decoded = self._pipeline.decode(draft.latents.to(compute_device(self._pipeline.vae)))
            self._on_step(0)
        return ComingPixels(decoded)

    def _arrived(self, coming: ComingPixels) -> list[Pixels | ImageFault]:
        pixels = coming.wait()
        self._clock.settle()
        return pixels

    def _merge_loras(self, names: Sequence[str]) -> None:
        """Put a batch's adapters into the weights, and take those of the last one out."""
        started = time.perf_counter()
        use(self._pipeline.transformer)  # sums of weights are made where they are quick
        if self._loras.apply({name: self._scales[name] for name in names}):
            seconds = time.perf_counter() - started
            self._log(f"LoRAs {', '.join(names) or 'none'} put in, in {seconds:.2f} s")


def _indices(batch: Sequence[Sample]) -> tuple[int, ...]:
    return tuple(sample.index for sample in batch)


def _to_host(conditions: Sequence[Condition]) -> list[Condition]:
    """Equal prompts share one tensor, and go on doing so. Edits are there already."""
    moved = {id(c): c if isinstance(c, Edit) else c.cpu() for c in conditions}
    return [moved[id(condition)] for condition in conditions]
