"""`zimage plan`: everything a run needs, checked without loading a model or starting a worker."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.config import JobConfig
from jobs.errors import EXIT_OK, InputError, ModelError, StorageError
from jobs.plan import PromptError, Sample, make_sample
from jobs.preparation import Prepared, RunOptions, output_uri, prepare
from jobs.quantities import counted, duration, file_size
from jobs.record import check_weights
from jobs.roofline import (
    CAPTION_TOKENS,
    CARDS,
    PUBLISHED,
    VISUAL_TOKENS,
    denoising_flops,
    latents_tokens,
)
from jobs.terminal import visible
from zimage_core.step_cache import computed_steps
from zimage_core.strength import first_step

_SHOWN_PROMPTS = 4
_SHOWN_REDONE = 20
# Bytes of a PNG for each pixel, from 1024 x 1024 test images of natural statistics: 1.8 MB.
_BYTES_PER_PIXEL = {"png": 1.8, "jpeg": 0.5, "webp": 0.4}


def plan_report(
    config: JobConfig,
    *,
    gpus: int | None,
    device: str | None,
    as_json: bool,
    redo_rejected: bool = False,
) -> int:
    """Check a job and print what it will do; exit code 0.

    Args:
        redo_rejected: what a run with this flag will do.

    Raises:
        JobError: the first thing that a run would stumble over.
    """
    if device is not None and device.lower() not in CARDS:
        raise InputError(f"--device: {device!r}: unknown; allowed: {', '.join(CARDS)}")
    prepared = prepare(config, RunOptions(redo_rejected=redo_rejected), create=False)
    report = _report(prepared, gpus, device)
    if as_json:
        print(visible(json.dumps(report, indent=2, ensure_ascii=False), longest=None))
    else:
        print(visible(format_plan(report)))
    return EXIT_OK


def _report(prepared: Prepared, gpus: int | None, device: str | None) -> dict[str, Any]:
    """The report; keys are documented in docs/cli.md and stable."""
    config, resume = prepared.config, prepared.resume
    model = _model(prepared)
    bytes_expected = int(
        resume.num_to_make
        * config.sampling.width
        * config.sampling.height
        * _BYTES_PER_PIXEL[config.output.format]
    )
    free = _free_bytes(prepared)
    samples = _samples(prepared)
    return {
        "name": config.name,
        "output": output_uri(config, None),
        "samples": resume.plan.num_samples,
        "shards": resume.plan.num_shards,
        "to_make": resume.num_to_make,
        "resume": resume.words(),
        "redo": [
            {"index": r.index, "seed": r.seed, "next_seed": r.next.seed, "note": r.note}
            for r in resume.redone
        ],
        "notes": resume.marks.notes() if resume.marks else [],
        "model": model,
        "loras": _loras(prepared),
        "disk": {
            "expected_bytes": bytes_expected,
            "free_bytes": free,
            "enough": free is None or free >= bytes_expected,
        },
        "time": _time(prepared, list(samples.values()), gpus, device),
        "prompts": [_prompt(index, sample) for index, sample in samples.items()],
    }


def format_plan(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    model, disk, time = report["model"], report["disk"], report["time"]
    free = f", {file_size(disk['free_bytes'])} free" if disk["free_bytes"] is not None else ""
    if not disk["enough"]:
        free += ": NOT ENOUGH for all of them"
    lines = [
        f"{report['name']}: {counted(report['samples'], 'sample')} in "
        f"{counted(report['shards'], 'shard')} -> {report['output']}",
        f"  run      {report['resume']}",
    ]
    lines += [f"           NOTE: {note}" for note in report["notes"]]
    for redo in report["redo"][:_SHOWN_REDONE]:
        note = f": {redo['note']}" if redo["note"] else ""
        lines.append(f"    {redo['index']:>6}  seed {redo['seed']} -> {redo['next_seed']}{note}")
    hidden = len(report["redo"]) - _SHOWN_REDONE
    if hidden > 0:
        lines.append(f"            ... and {hidden:,} more (--json lists all)")
    if model["state"] == "complete":
        lines.append(
            f"  model    {model['path']}: {model['parameters'] / 1e6:,.1f} M parameters, "
            f"{file_size(model['bytes'])}, complete"
        )
    else:
        lines.append(f"  model    {model['path']}: to be fetched from {model['repo']}")
    lines += [f"           {name} from {path}" for name, path in model["parts"].items()]
    lines += [f"           NOTE: {note}" for note in model.get("notes", ())]
    for lora in report["loras"]:
        held = lora["summary"] or "to be checked once the model is there"
        lines.append(f"  lora     {lora['name']} at {lora['scale']:g}: {lora['path']}: {held}")
        lines += [f"           NOTE: {warning}" for warning in lora["warnings"]]
    lines.append(f"  disk     about {file_size(disk['expected_bytes'])}{free}")
    if time is None:
        lines.append("  time     say --gpus N --device NAME for an estimate")
    else:
        lines.append(
            f"  time     about {duration(time['seconds'])} on {time['gpus']} x {time['device']} "
            f"({time['seconds_per_image']:.2f} s an image; computed, not measured)"
        )
    lines.append("  prompts")
    for prompt in report["prompts"]:
        loras = f"  [{', '.join(prompt['loras'])}]" if prompt.get("loras") else ""
        images = f"  from {prompt['init_image']}" if prompt.get("init_image") else ""
        if prompt.get("pictures"):
            images = f"  edits {', '.join(prompt['pictures'])}"
        words = f"{prompt.get('prompt') or prompt['error']}{loras}{images}"
        lines.append(f"    {prompt['index']:>6}  {words}")
    return "\n".join(lines)


def _model(prepared: Prepared) -> dict[str, Any]:
    config = prepared.config.model
    folder = config.folder
    parts = {name: str(path) for name, path in config.parts.items()}
    for name, path in config.parts.items():
        if not path.exists():
            place = prepared.config.place(f"model.{name}")
            raise ModelError(f"{place}: {path}: no such file; allowed: a file or a folder")
    if not folder.exists():
        if config.repo is None:
            raise ModelError(
                f"{prepared.config.place('model.path')}: {folder}: no such folder, and no "
                "model.repo to fetch it from"
            )
        return {"path": str(folder), "state": "missing", "repo": config.repo, "parts": parts}

    from jobs.fingerprint import node_fingerprint
    from zimage_core.loader import check_checkpoint

    try:
        summary = check_checkpoint(folder, **config.parts)
        if prepared.record is not None:
            found = node_fingerprint(folder, **config.parts)
            check_weights(prepared.storage, prepared.record, found)
    except (ValueError, OSError) as error:
        place = prepared.config.place(config.key_of(str(error)))
        raise ModelError(f"{place}: {error}") from error
    return {
        "path": str(folder),
        "state": "complete",
        "repo": config.repo,
        "parts": parts,
        "notes": list(summary.notes),
        "parameters": sum(summary.num_parameters.values()),
        "bytes": summary.num_bytes,
    }


def _loras(prepared: Prepared) -> list[dict[str, Any]]:
    """The adapters that the job declares, and what their headers say."""
    return [
        {
            "name": lora.name,
            "path": str(lora.path),
            "scale": lora.scale,
            "fingerprint": lora.fingerprint,
            "modules": None if lora.report is None else len(lora.report.modules),
            "unmatched": None if lora.report is None else list(lora.report.unmatched),
            "summary": None if lora.report is None else lora.report.words(),
            "warnings": [] if lora.report is None else lora.report.warnings(),
        }
        for lora in prepared.loras.values()
    ]


def _samples(prepared: Prepared) -> dict[int, Sample | PromptError]:
    """The first samples by index, or what is wrong with their prompts."""
    plan = prepared.plan
    samples: dict[int, Sample | PromptError] = {}
    for index in range(plan.start, min(plan.stop, plan.start + _SHOWN_PROMPTS)):
        try:
            samples[index] = make_sample(
                prepared.config,
                prepared.generator,
                index,
                takes_pictures=prepared.takes_pictures,
            )
        except PromptError as error:
            samples[index] = error
    return samples


def _prompt(index: int, sample: Sample | PromptError) -> dict[str, Any]:
    if isinstance(sample, PromptError):
        return {"index": index, "error": str(sample)}
    return {
        "index": index,
        "prompt": sample.prompt,
        "negative_prompt": sample.negative_prompt or None,
        "seed": sample.seed,
        "width": sample.width,
        "height": sample.height,
        "loras": list(sample.loras),
        "init_image": sample.init_image and sample.init_image.name,
        "pictures": [picture.name for picture in sample.pictures],
    }


def _time(
    prepared: Prepared,
    samples: Sequence[Sample | PromptError],
    gpus: int | None,
    device: str | None,
) -> dict[str, Any] | None:
    """Expected seconds from floating-point operations alone, for the published 6B size.

    Every prompt is taken to start from an image where one may, and to edit as many pictures, of
    such sizes, as the samples do.
    """
    if device is None:
        return None
    sampling = prepared.config.sampling
    pictures = [
        picture.sizes(sample.width * sample.height).cropped
        for sample in samples
        if isinstance(sample, Sample)
        for picture in sample.pictures
    ]
    steps = sampling.num_inference_steps
    starts = prepared.config.prompts.images_root is not None and not prepared.takes_pictures
    if starts and not pictures:
        steps -= first_step(steps, sampling.strength)
    guided = sampling.guidance_scale > 0
    steps = sum(computed_steps([guided] * steps, sampling.cache))
    forwards = steps * (2 if guided else 1)
    card = CARDS[device.lower()]
    share = 1 / max(1, sum(isinstance(sample, Sample) for sample in samples))
    flops = denoising_flops(
        PUBLISHED,
        sampling.width,
        sampling.height,
        forwards,
        caption=CAPTION_TOKENS + round(VISUAL_TOKENS * len(pictures) * share),
        pictures=round(sum(latents_tokens(*size) for size in pictures) * share),
    )
    # the decoder: 10.5 TFLOP at 1024 x 1024, linear in the pixels
    flops += 10.47e12 * sampling.width * sampling.height / 1024**2
    encoded = sum(width * height for width, height in pictures) * share
    if starts and not pictures:
        encoded = sampling.width * sampling.height
    flops += 4.88e12 * encoded / 1024**2  # the encoder
    seconds = flops / (card.peak * card.share)
    number = gpus or 1
    return {
        "device": device.lower(),
        "gpus": number,
        "seconds_per_image": seconds,
        "seconds": prepared.resume.num_to_make * seconds / number,
        "basis": "computed from floating-point operations of the 6B model; not measured",
    }


def _free_bytes(prepared: Prepared) -> int | None:
    root = prepared.storage.root
    if root is None:
        return None
    folder = root
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise StorageError(f"output.uri: {prepared.storage.uri}: {folder} cannot be written")
    return shutil.disk_usage(Path(folder)).free
