"""The images that a job's prompts bring: refused early, found below `prompts.images_root`, told by
content.

What they are for depends on the checkpoint: text-to-image models start from one, others edit them.
A prompt names its images; what counts is the files' content. Their hashes are taken when a sample
is planned, go into the sample's row, and must be the same when the images are decoded. A resume
compares them with those of the files as they are then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jobs.config import PIXEL_MULTIPLE, JobConfig
from jobs.errors import InputError
from prompt_generators import GENERATORS
from zimage_core.image_files import ImageFileError, path_below, read_image
from zimage_core.picture_sizes import PictureSizes, picture_sizes
from zimage_core.step_cache import check_cache
from zimage_core.strength import first_step

if TYPE_CHECKING:
    from PIL.Image import Image

_FILES_KEPT = 65536  # some 30 MB; an image of many prompts is hashed once


@dataclass(frozen=True, slots=True)
class InputImage:
    """An image that a sample is made from.

    Args:
        name: relative to `prompts.images_root`, as the prompt gave it.
        sha256: of the file's content, hex.
        size: width and height in pixels; not known of what a row tells.
    """

    name: str
    sha256: str
    size: tuple[int, int] = (0, 0)

    def sizes(self, area: int) -> PictureSizes:
        """In which sizes it is edited where the result has so many pixels. Raises ValueError."""
        return picture_sizes(*self.size, multiple=PIXEL_MULTIPLE, area=area)


class ImageRole(NamedTuple):
    """What a checkpoint does with the images of a prompt, and where rows tell of them.

    Several names, and several hashes, stand one a line.
    """

    word: str
    """What a message calls one."""
    name_key: str
    """Metadata that holds their names."""
    hash_key: str
    """Metadata that holds their hashes."""

    def metadata(self, images: Sequence[InputImage]) -> dict[str, str]:
        """What the row of a sample says of its images."""
        if not images:
            return {}
        return {
            self.name_key: "\n".join(image.name for image in images),
            self.hash_key: "\n".join(image.sha256 for image in images),
        }

    def recorded(self, row: Mapping[str, object], prefix: str) -> tuple[InputImage, ...]:
        """The images that a row tells of; `prefix` stands before the keys of its metadata."""
        names, hashes = (row.get(prefix + key) for key in (self.name_key, self.hash_key))
        if names is None or hashes is None:
            return ()
        if self is STARTED_FROM:
            return (InputImage(str(names), str(hashes)),)
        # In a row of somebody else's making one may be missing: no file has an empty name or hash.
        pairs = zip_longest(str(names).split("\n"), str(hashes).split("\n"), fillvalue="")
        return tuple(InputImage(*pair) for pair in pairs)


STARTED_FROM = ImageRole("starting image", "init_image", "init_image_sha256")
EDITED = ImageRole("picture", "images", "images_sha256")


def image_role(takes_pictures: bool) -> ImageRole:
    """The role of images for a checkpoint that edits pictures, or does not."""
    return EDITED if takes_pictures else STARTED_FROM


def check_images(config: JobConfig, takes_pictures: bool | None, node: str | None = None) -> None:
    """Refuse what would fail for every image that the prompts of a job bring.

    Args:
        takes_pictures: whether the checkpoint edits them; None where that is not known yet.
        node: where a worker runs, for the message; None for the driver's own.

    Raises:
        InputError: `prompts.images_root` is no folder, or missing where the table's option
            `image_column` needs it; or, for images that are started from, `sampling.strength`
            leaves no step to run, or too few for `sampling.cache`.
    """
    prompts, sampling = config.prompts, config.sampling
    place = config.place("prompts.images_root")
    if prompts.images_root is None:
        column = prompts.options.get("image_column")
        if prompts.generator in GENERATORS and column not in (None, []):
            raise InputError(
                f"{place}: null: the option image_column {column!r} needs it; allowed: the folder "
                "below which the images are"
            )
        return
    if not prompts.images_root.is_dir():
        here = "" if node is None else f" on {node}"
        raise InputError(f"{place}: {prompts.images_root}: no such folder{here}")
    if takes_pictures:
        return
    try:
        first = first_step(sampling.num_inference_steps, sampling.strength)
    except ValueError as error:
        raise InputError(f"{config.place('sampling.strength')}: {error}") from error
    try:
        check_cache(sampling.cache, sampling.num_inference_steps - first)
    except ValueError as error:
        raise InputError(f"{config.place('sampling.cache')}: {error}") from error


def find_images(root: Path | None, names: Sequence[str]) -> tuple[InputImage, ...]:
    """The images that a prompt names; of each the header is read.

    Args:
        root: the job's `prompts.images_root`.
        names: relative to it.

    Raises:
        ImageFileError: there is no `root`, or what is wrong with a name or a file.
    """
    return tuple(_find(root, name) for name in names)


def check_use(images: Sequence[InputImage], takes_pictures: bool, area: int) -> None:
    """Refuse images that cannot be used as the checkpoint uses them.

    Args:
        area: pixels of the image that is made.

    Raises:
        ImageFileError: more than one to start from; or one to edit that is too small, too long, or
            whose name has more than one line, so that no row could tell of it.
    """
    if not takes_pictures:
        if len(images) > 1:
            raise ImageFileError(
                f"{', '.join(image.name for image in images)}: {len(images)} images, but the "
                "checkpoint takes none to edit; allowed: one to start from"
            )
        return
    for image in images:
        if "\n" in image.name:
            raise ImageFileError(f"{image.name!r}: allowed: a name of one line")
        try:
            image.sizes(area)
        except ValueError as error:
            raise ImageFileError(f"{image.name}: {error}") from error


def decode_image(root: Path | None, image: InputImage) -> Image:
    """The image itself, RGB, upright.

    Raises:
        ImageFileError: the file cannot be read or decoded, or is not what was planned any more.
    """
    file = read_image(_path(root, image.name), name=image.name)
    found = file.sha256
    if found != image.sha256:
        raise ImageFileError(
            f"{image.name}: changed while the job ran: its sha256 was {image.sha256} and is {found}"
        )
    return file.decode()


def _find(root: Path | None, name: str) -> InputImage:
    path = _path(root, name)
    try:
        status = path.stat()
    except OSError as error:
        raise ImageFileError(f"{name}: cannot be read: {error.strerror}") from error
    # A file is read again where it may be another one. The time of its last change goes along, as
    # no program can set it.
    version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _read(path, version, name)


@lru_cache(maxsize=_FILES_KEPT)
def _read(path: Path, version: tuple[int, ...], name: str) -> InputImage:
    file = read_image(path, name=name)
    return InputImage(name, file.sha256, file.size())


def _path(root: Path | None, name: str) -> Path:
    if root is None:
        raise ImageFileError(f"{name}: the job has no prompts.images_root to find it below")
    return path_below(root, name)
