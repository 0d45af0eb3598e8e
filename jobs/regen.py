"""`zimage regen`: make samples again, compare with what is stored, and say what has changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from jobs.config import JobConfig
from jobs.errors import EXIT_DIFFERENCE, EXIT_OK, InputError, StorageError, StorageUnusableError
from jobs.layers import INPUT_PATHS
from jobs.output import Output, read_image_bytes
from jobs.pixel_difference import PixelDifference, pixel_difference
from jobs.progress_bar import ProgressBar
from jobs.quantities import counted
from jobs.record import PATH
from jobs.recorded_batch import Row, recorded_batches
from jobs.terminal import visible
from jobs.writers import WRITERS, Pixels, decode_image, pixels_sha256
from jobs.yaml_file import YamlFileError, read_value

if TYPE_CHECKING:
    from jobs.image_faults import ImageFault

_LOSSY = ("jpeg", "webp")


@dataclass(frozen=True)
class Compared:
    """What came of one sample.

    Args:
        pixels_sha256: of the row; `made_sha256` of what was made now, None where that is no image.
        max_difference: largest difference from the stored image, of 255; `differing`: share of the
            values that are others; `psnr`: in decibels, None where nothing differs. All three are
            None where there is nothing to compare, for which `problem` gives the cause.
    """

    index: int
    equal: bool
    pixels_sha256: str
    made_sha256: str | None
    batch: list[int]
    batch_mode: str
    dtype: str
    format: str
    max_difference: int | None = None
    differing: float | None = None
    psnr: float | None = None
    problem: str | None = None


def regen(
    uri: str,
    indices: Sequence[int],
    *,
    sets: Sequence[str] = (),
    write: Path | None = None,
    as_json: bool = False,
) -> int:
    """Make samples of an output again and print how they compare; exit code 0, or 1 if one differs.

    Args:
        sets: `KEY=VALUE` for paths of the job that are others now.
        write: a folder for the images that were made.

    Raises:
        InputError: there is no such output, sample or setting.
        ModelError: the model cannot be loaded or run here.
        StorageError: the output cannot be read.
    """
    output = Output.open(uri)
    config = _recorded_config(output, sets)
    batches = recorded_batches(output, indices)
    if write is not None:
        _make_folder(write, output)
    from jobs.image_faults import ImageFault
    from jobs.provenance import changes_since
    from jobs.regenerator import Regenerator

    names = sorted({name for batch in batches for sample in batch.samples for name in sample.loras})
    regenerator = Regenerator(config, output.record.settings, names)
    results: list[Compared] = []
    written: list[str] = []
    with ProgressBar("making again", len(batches), "batch") as bar:
        for batch in batches:
            for index, image in regenerator.make(batch).items():
                results.append(_compare(output, batch.rows[index], image))
                if write is not None and not isinstance(image, ImageFault):
                    written.append(_write(write, config.name, index, image))
            bar.update()
    results.sort(key=lambda result: result.index)
    differs = any(not result.equal for result in results)
    changed = changes_since(output, config, batches, regenerator) if differs else []
    report = {
        "output": uri,
        "equal": sum(result.equal for result in results),
        "samples": [asdict(result) for result in results],
        "changed": changed,
        "written": sorted(written),
    }
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print(visible(format_regen(report)))
    return EXIT_DIFFERENCE if differs else EXIT_OK


def format_regen(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = []
    for sample in report["samples"]:
        together = "" if len(sample["batch"]) == 1 else f", in a batch of {len(sample['batch'])}"
        words = f"equal{together}" if sample["equal"] else f"different: {_difference(sample)}"
        lines.append(f"sample {sample['index']}: {words}")
    number = len(report["samples"])
    lines.append(f"{report['equal']:,} of {counted(number, 'sample')} made again with equal pixels")
    if report["equal"] < number:
        if report["changed"]:
            lines.append("what has changed since they were made:")
            lines += [f"  {words}" for words in report["changed"]]
        else:
            lines.append(
                "nothing that is recorded has changed since; not recorded are the kind of CPU, "
                "drivers and libraries of the system, and a device that computes wrongly"
            )
    if report["written"]:
        lines.append(f"{counted(len(report['written']), 'image')} written:")
        lines += [f"  {file}" for file in report["written"]]
    return "\n".join(lines)


def _difference(sample: dict[str, Any]) -> str:
    if sample["problem"] is not None:
        return str(sample["problem"])
    lossy = f"; it is stored as {sample['format']}, which loses some" * (sample["format"] in _LOSSY)
    if sample["max_difference"] == 0:
        return "equal to the stored image, whose pixels are not those of its row's hash"
    keys = ("max_difference", "differing", "psnr")
    words = PixelDifference(**{key: sample[key] for key in keys}).words()
    return f"{words}, from the stored image{lossy}"


def _recorded_config(output: Output, sets: Sequence[str]) -> JobConfig:
    """The job of `job.json`, with paths that are others now."""
    job = json.loads(json.dumps(output.record.config))
    for assignment in sets:
        key, separator, text = assignment.partition("=")
        keys = tuple(key.strip().split("."))
        if not separator or not any(_fits(keys, pattern) for pattern in INPUT_PATHS):
            allowed = ", ".join(".".join(pattern).replace("*", "NAME") for pattern in INPUT_PATHS)
            raise InputError(f"--set: {assignment!r}: allowed: KEY=PATH, KEY one of {allowed}")
        try:
            value = read_value(text)
        except YamlFileError as error:
            raise InputError(f"--set: {key}: value {text!r}: {error}") from error
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"--set: {key}: value {text!r}: allowed: a path")
        place = job
        for part in keys[:-1]:
            if not isinstance(place.get(part), dict):
                raise InputError(f"--set: {key}: the job of {output.storage.uri} has no {part}")
            place = place[part]
        place[keys[-1]] = str(Path(value).expanduser().absolute())
    try:
        return JobConfig.model_validate_json(json.dumps(job))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise StorageError(
            f"{output.storage.uri}/{PATH}: job.{key}: {first['msg']}: damaged, or written by a "
            "newer version of this program"
        ) from error


def _fits(keys: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return len(keys) == len(pattern) and all(
        wanted in ("*", key) for key, wanted in zip(keys, pattern, strict=True)
    )


def _make_folder(folder: Path, output: Output) -> None:
    root = output.storage.root
    if root is not None and folder.resolve().is_relative_to(root.resolve()):
        raise InputError(f"--write: {folder}: is in the output, which regen never changes")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--write: {folder}: cannot be made: {error.strerror}") from error


def _write(folder: Path, name: str, index: int, image: Pixels) -> str:
    file = folder / f"{name}_{index:08d}.png"
    try:
        file.write_bytes(WRITERS["png"].encode(image))
    except OSError as error:
        raise InputError(f"--write: {file}: cannot be written: {error.strerror}") from error
    return str(file)


def _compare(output: Output, row: Row, image: Pixels | ImageFault) -> Compared:
    from jobs.image_faults import ImageFault

    common = {key: row[key] for key in ("index", "pixels_sha256", "batch_mode", "dtype", "format")}
    common["batch"] = list(row["batch"])
    if isinstance(image, ImageFault):
        words = f"no image was made: {image.message}"
        return Compared(equal=False, made_sha256=None, problem=words, **common)
    made = pixels_sha256(image)
    if made == row["pixels_sha256"]:
        return Compared(equal=True, made_sha256=made, **common)
    return Compared(equal=False, made_sha256=made, **common, **_distance(output, row, image))


def _distance(output: Output, row: Row, image: Pixels) -> dict[str, Any]:
    """How far an image is from the stored one."""
    words = "the stored image cannot be compared: "
    try:
        content = read_image_bytes(output.storage, row)
        if content is None:
            return {"problem": f"{words}the file is missing"}
        stored = decode_image(content)
    except (StorageUnusableError, OSError, ValueError) as error:
        return {"problem": f"{words}{error}"}
    if stored.shape != image.shape:
        return {"problem": f"{words}it has {stored.shape[1]}x{stored.shape[0]} pixels"}
    return asdict(pixel_difference(stored, image))
