"""Starting images of a job: refused early, found below `prompts.images_root`, told by content.

A prompt names its image; what counts is the file's content. Its hash is taken when a sample is
planned, goes into the sample's row, and must be the same when the image is decoded. A resume
compares it with that of the file as it is then.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.config import JobConfig
from jobs.errors import InputError
from prompt_generators import GENERATORS
from zimage_core.image_files import ImageFileError, path_below, read_image
from zimage_core.step_cache import check_cache
from zimage_core.strength import first_step

if TYPE_CHECKING:
    from PIL.Image import Image

NAME_KEY = "init_image"
HASH_KEY = "init_image_sha256"
_HASHES_KEPT = 65536  # some 30 MB; an image of many prompts is hashed once


@dataclass(frozen=True, slots=True)
class InitImage:
    """The image that a sample starts from.

    Args:
        name: relative to `prompts.images_root`, as the prompt gave it.
        sha256: of the file's content, hex.
    """

    name: str
    sha256: str

    @property
    def metadata(self) -> dict[str, str]:
        """What its row says of it."""
        return {NAME_KEY: self.name, HASH_KEY: self.sha256}


def check_images(config: JobConfig, node: str | None = None) -> None:
    """Refuse what would fail for every starting image of a job.

    Args:
        node: where a worker runs, for the message; None for the driver's own.

    Raises:
        InputError: `prompts.images_root` is no folder, or missing where the table's option
            `image_column` needs it; or `sampling.strength` leaves no step to run, or too few
            for `sampling.cache`.
    """
    prompts, sampling = config.prompts, config.sampling
    place = config.place("prompts.images_root")
    if prompts.images_root is None:
        column = prompts.options.get("image_column")
        if prompts.generator in GENERATORS and column is not None:
            raise InputError(
                f"{place}: null: the option image_column {column!r} needs it; allowed: the folder "
                "below which the images are"
            )
        return
    if not prompts.images_root.is_dir():
        here = "" if node is None else f" on {node}"
        raise InputError(f"{place}: {prompts.images_root}: no such folder{here}")
    try:
        first = first_step(sampling.num_inference_steps, sampling.strength)
    except ValueError as error:
        raise InputError(f"{config.place('sampling.strength')}: {error}") from error
    try:
        check_cache(sampling.cache, sampling.num_inference_steps - first)
    except ValueError as error:
        raise InputError(f"{config.place('sampling.cache')}: {error}") from error


def find_image(root: Path | None, names: tuple[str, ...]) -> InitImage | None:
    """The starting image among a prompt's `images`: none, or one file, of which the header is read.

    Args:
        root: the job's `prompts.images_root`.
        names: relative to it.

    Raises:
        ImageFileError: more than one image, no `root`, or what is wrong with the name or the file.
    """
    if not names:
        return None
    if len(names) > 1:
        raise ImageFileError(
            f"{', '.join(names)}: {len(names)} images, which is editing and not available yet; "
            "allowed: one to start from"
        )
    if root is None:
        raise ImageFileError(f"{names[0]}: the job has no prompts.images_root to find it below")
    path = path_below(root, names[0])
    try:
        status = path.stat()
    except OSError as error:
        raise ImageFileError(f"{names[0]}: cannot be read: {error.strerror}") from error
    # A file is read again where it may be another one. The time of its last change goes along, as
    # no program can set it.
    version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return InitImage(names[0], _sha256(path, version, names[0]))


@lru_cache(maxsize=_HASHES_KEPT)
def _sha256(path: Path, version: tuple[int, ...], name: str) -> str:
    file = read_image(path, name=name)
    file.check()
    return file.sha256


def decode_image(root: Path | None, image: InitImage) -> Image:
    """The image itself, RGB, upright.

    Raises:
        ImageFileError: the file cannot be read or decoded, or is not what was planned any more.
    """
    if root is None:
        raise ImageFileError(f"{image.name}: the job has no prompts.images_root to find it below")
    file = read_image(path_below(root, image.name), name=image.name)
    found = file.sha256
    if found != image.sha256:
        raise ImageFileError(
            f"{image.name}: changed while the job ran: its sha256 was {image.sha256} and is {found}"
        )
    return file.decode()
