"""A job's model once more, to repeat batches that a worker made; nothing is written.

It computes as a worker does: the settings are those of `job.json`, the stages are the worker's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from jobs.batch_stages import BatchStages
from jobs.config import JobConfig
from jobs.device import describe_device, is_out_of_memory
from jobs.errors import InputError, ModelError
from jobs.executor import Settings
from jobs.fingerprint import adapter_fingerprint
from jobs.image_faults import ImageFault
from jobs.input_images import check_use, find_images, image_role
from jobs.loras import load_loras
from jobs.pipeline_loader import load_components
from jobs.plan import Sample
from jobs.recorded_batch import RecordedBatch
from jobs.writers import Pixels
from zimage_core import ZImagePipeline
from zimage_core.image_files import ImageFileError


class Regenerator:
    """Loads a job's model and makes recorded batches with it.

    Args:
        config: the job, as `job.json` has it.
        settings: what its driver resolved.
        loras: the adapters that are needed, by name.

    Raises:
        InputError: an attention backend, 8-bit weights or compiled blocks cannot run here.
        ModelError: the checkpoint or an adapter is not here or cannot be loaded.
    """

    def __init__(self, config: JobConfig, settings: Settings, loras: Sequence[str]) -> None:
        self.info = describe_device()
        self.changes: list[str] = []  # besides what was asked for
        self._root = config.prompts.images_root
        self._role = image_role(settings.takes_pictures)
        if settings.device_type != self.info.device_type:
            settings = self._of_this_device(settings)
        self._dtype = settings.dtype
        torch.set_num_threads(settings.threads_per_worker)
        pipeline = ZImagePipeline(**_load(config, settings, self.info.device_type))
        declared = config.model.loras
        for name in loras:
            if name not in declared:
                raise InputError(f"model.loras: {name!r} is no adapter of the job any more")
        used = {name: declared[name] for name in loras}
        found = {}
        for name, lora in used.items():
            try:
                found[name] = adapter_fingerprint(lora.path)
            except (OSError, ValueError) as error:
                raise ModelError(f"model.loras.{name}.path: {error}") from error
            if found[name] != settings.loras.get(name):
                words = f"was {settings.loras.get(name)}, now {found[name]}"
                self.changes.append(f"adapter {name} ({lora.path}): {words}")
        model = config.model.model_copy(update={"loras": used})
        self._stages = BatchStages(
            pipeline,
            loras=load_loras(
                config.model_copy(update={"model": model}), pipeline.transformer, found
            ),
            scales={name: lora.scale for name, lora in used.items()},
            sampling=config.sampling,
            images_root=self._root,
            takes_pictures=settings.takes_pictures,
            on_step=lambda _: None,
            log=lambda _: None,
        )

    def make(self, batch: RecordedBatch) -> dict[int, Pixels | ImageFault]:
        """Make a batch as it was made; what came of the samples that are asked for.

        Raises:
            InputError: an image that a sample is made from is gone or cannot be used.
            ModelError: the batch cannot be made here.
        """
        samples = [self._with_images(sample) for sample in batch.samples]
        images = self._stages.read(samples)
        for index, fault in images.faults.items():
            raise InputError(f"sample {index}: {self._role.word}: {fault}")
        try:
            if batch.dtype != self._dtype:  # its second try, see `BatchMaker`
                made = [self._stages.make_in_float32(samples[0], images)]
            else:
                made = self._stages.make(samples, images)
        except Exception as error:
            indices = ", ".join(str(sample.index) for sample in samples)
            if is_out_of_memory(error):
                words = f"there is not enough memory to make them together: {error}"
            else:
                words = f"cannot be made here: {type(error).__name__}: {error}"
            raise ModelError(f"samples {indices}: {words}") from error
        by_index = {sample.index: image for sample, image in zip(samples, made, strict=True)}
        return {index: by_index[index] for index in batch.rows}

    def _with_images(self, sample: Sample) -> Sample:
        """The sample with its images as they are now, and a word for each that changed."""
        names = [image.name for image in sample.images]
        try:
            images = find_images(self._root, names)
            check_use(images, sample.edits, sample.width * sample.height)
        except ImageFileError as error:
            raise InputError(f"sample {sample.index}: {self._role.word}: {error}") from error
        for before, now in zip(sample.images, images, strict=True):
            if now.sha256 != before.sha256:
                self.changes.append(
                    f"{self._role.word} {now.name} of sample {sample.index}: sha256 was "
                    f"{before.sha256}, now {now.sha256}"
                )
        return replace(sample, images=images)

    def _of_this_device(self, settings: Settings) -> Settings:
        """Settings that any device can do: on another kind equal bytes are not promised anyway."""
        plain = replace(settings, attention="native", compile=False, offload="none")
        for key in ("attention", "compile", "offload"):
            before, now = getattr(settings, key), getattr(plain, key)
            if before != now:
                words = f"was {before}, is {now} on {self.info.device_type}"
                self.changes.append(f"model.{key}: {words}")
        return plain


def _load(config: JobConfig, settings: Settings, device: str) -> dict[str, Any]:
    model = config.model
    hint = "say where they are with --set model.path=DIR"
    if not model.folder.is_dir():
        fetch = f", or fetch them: zimage weights download {model.repo} DIR" if model.repo else ""
        raise ModelError(f"model.path: {model.folder}: no such folder; {hint}{fetch}")
    try:
        made = f"the images were made with {settings.attention!r}"
        return load_components(config, model.folder, settings, device, hint=made)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise ModelError(f"{model.key_of(str(error))}: {error}") from error
