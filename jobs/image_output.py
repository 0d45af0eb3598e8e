"""From pixels to a committed file's facts: check, encode, hash and write, beside the next batch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from jobs.config import JobConfig
from jobs.errors import ErrorType, StorageError, StorageUnusableError
from jobs.executor import Message, Result, Settings
from jobs.image_metadata import job_making, with_metadata
from jobs.manifest import BatchMode
from jobs.plan import Sample
from jobs.stage_clock import StageClock
from jobs.storage import Storage
from jobs.writers import Pixels, job_writer, pixels_sha256, sha256

_THREADS = 2


@dataclass(frozen=True, slots=True)
class Made:
    """How an image was made: what its row says besides the file's facts."""

    index: int
    attempt: str
    batch: tuple[int, ...]
    batch_mode: BatchMode
    seconds: float = 0.0  # of the device, for this image
    dtype: str | None = None  # where another than the job's

    def failed(self, error_type: ErrorType, message: str) -> Result:
        """The result of a sample that has no image."""
        return Result(
            index=self.index,
            batch=self.batch,
            batch_mode=self.batch_mode,
            created_at=datetime.now(UTC),
            error_type=error_type,
            # what a generator puts into its exception may be no text that can be written
            error_message=message[:2000].encode(errors="replace").decode(),
        )


class ImageOutput:
    """Writes a worker's images on a few threads of its own.

    Args:
        storage: the output.
        config: gives the files' name and format, and whether they say how they were made.
    """

    def __init__(self, storage: Storage, config: JobConfig) -> None:
        self.storage = storage
        self.config = config
        self.settings: Settings | None = None  # of the job, known before its first image
        self.name = config.name
        self.writer = job_writer(config.output)
        self.clock: StageClock | None = None
        self.written = 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="writer")

    def submit(self, sample: Sample, made: Made, pixels: Pixels) -> Future[Result]:
        """Write uint8 `pixels` (H, W, 3) of a sample below the attempt's own prefix.

        The result is a failed one where the image cannot be encoded or written; a full or
        read-only output raises StorageUnusableError instead, as no fault of the sample.
        """
        return self._pool.submit(self._write, sample, made, pixels)

    def close(self) -> None:
        """End the threads once everything is written."""
        self._pool.shutdown()

    def deliver(self, attempt: str, messages: Iterable[Message]) -> Iterator[Message]:
        """The messages of a lease, each as soon as what it tells of is on the output."""
        yield from messages

    def _store(self, made: Made, file: str, content: bytes) -> str:
        """Keep an image file; the `file_name` of its row. Raises StorageError."""
        path = f"images/{made.attempt}/{file}"
        self.storage.put(path, content)
        return path

    def _encode(self, sample: Sample, made: Made, pixels: Pixels) -> bytes:
        level = self.config.output.embed_metadata
        content = self.writer.encode(pixels)
        if level == "none":
            return content
        assert self.settings is not None
        making = job_making(
            self.config,
            self.settings,
            sample,
            dtype=made.dtype,
            batch_size=len(made.batch),
            batch_mode=made.batch_mode,
        )
        return with_metadata(content, level, making, from_picture=bool(sample.images))

    def _write(self, sample: Sample, made: Made, pixels: Pixels) -> Result:
        started = time.perf_counter()
        file = f"{self.name}_{made.index:08d}.{self.writer.extension}"
        try:
            content = self._encode(sample, made, pixels)
            name = self._store(made, file, content)
        except StorageUnusableError:
            raise
        except StorageError as error:
            return made.failed("storage_error", str(error))
        except Exception as error:  # noqa: BLE001 - costs its image, not the worker
            return made.failed("generation_error", f"{type(error).__name__}: {error}")
        self.written += 1
        file_hash, pixels_hash = sha256(content), pixels_sha256(pixels)
        seconds = time.perf_counter() - started
        if self.clock is not None:
            self.clock.add("write", seconds)
        return Result(
            index=made.index,
            batch=made.batch,
            batch_mode=made.batch_mode,
            created_at=datetime.now(UTC),
            file_name=name,
            bytes=len(content),
            sha256=file_hash,
            pixels_sha256=pixels_hash,
            seconds=made.seconds + seconds,
            dtype=made.dtype,
        )
