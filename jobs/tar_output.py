"""`output.layout: webdataset`: the images of an attempt in one tar, `images/<attempt>.tar`.

A tar is written whole when its lease ends, also one that ends early (drained, or a part of it was
given up), and the driver hears of the lease's images only then: no row can name a tar that is not
there. A worker that dies takes the lease's images with it, which is at most one shard.

Members are in the order in which the images were made, three for each: `<key>.png` (or `.jpg`,
`.webp`), `<key>.json` with what the sample was, `<key>.txt` with the prompt. They carry no time and
no owner, so that equal images give equal bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import IO, Self

from jobs.config import JobConfig
from jobs.device import DeviceError
from jobs.errors import StorageError, StorageUnusableError
from jobs.executor import Finished, Message, Planned, Result
from jobs.image_output import ImageOutput, Made
from jobs.manifest import PROFILE_PREFIX
from jobs.plan import Sample
from jobs.resume import row_values
from jobs.stage_clock import add_seconds
from jobs.storage import Storage

_HEADER = tarfile.BLOCKSIZE  # of a member whose name needs no second header


class TarImageOutput(ImageOutput):
    """Encodes a worker's images like `ImageOutput`, and puts each lease's into one tar.

    `Result.file_name` is the member's name, `Result.tar` the tar's path in the output, and
    `Result.tar_offset` where in the tar the image's bytes begin.
    """

    def __init__(self, storage: Storage, config: JobConfig) -> None:
        super().__init__(storage, config)
        # The webdataset library takes what comes before a name's first dot for the sample's key.
        self.name = config.name.replace(".", "-")
        self._contents: dict[int, bytes] = {}  # of the lease under way, by sample

    def deliver(self, attempt: str, messages: Iterable[Message]) -> Iterator[Message]:
        """`Planned` at once; all results of the lease together, once the tar is there.

        Raises:
            StorageUnusableError: the output, or the folder of temporary files, cannot be written.
            DeviceError: from `messages`; what was made before is delivered first.
        """
        path = f"images/{attempt}.tar"
        results: list[Result] = []
        stages: dict[str, float] = {}
        self._contents.clear()
        with _TarWriter(path) as writer:
            samples: dict[int, Sample] = {}
            failure: DeviceError | None = None
            try:
                for message in messages:
                    if isinstance(message, Planned):
                        samples = {sample.index: sample for sample in message.samples}
                        yield message
                        continue
                    add_seconds(stages, message.stages)
                    results += [self._add(writer, samples, result) for result in message.results]
            except DeviceError as error:
                failure = error
            if writer.members:
                results = self._put(writer, results)
        if results:
            yield Finished(tuple(results), stages)
        if failure is not None:
            raise failure

    def _store(self, made: Made, file: str, content: bytes) -> str:
        self._contents[made.index] = content
        return file

    def _add(self, writer: _TarWriter, samples: dict[int, Sample], result: Result) -> Result:
        content = self._contents.pop(result.index, None)
        if result.file_name is None or content is None:
            return result
        offset = writer.add(result.file_name, content)
        key = result.file_name.partition(".")[0]
        sample = samples[result.index]
        writer.add(f"{key}.json", _described(sample))
        writer.add(f"{key}.txt", sample.prompt.encode())
        return replace(result, tar=writer.path, tar_offset=offset)

    def _put(self, writer: _TarWriter, results: list[Result]) -> list[Result]:
        """Write the tar; where that fails for good, its images are failed ones."""
        try:
            self.storage.put(writer.path, writer.close())
        except StorageUnusableError:
            raise
        except StorageError as error:
            return [_unwritten(result, str(error)) for result in results]
        return results


def image_output(storage: Storage, config: JobConfig) -> ImageOutput:
    """The writer of a job's images, by `output.layout`."""
    kind = TarImageOutput if config.output.layout == "webdataset" else ImageOutput
    return kind(storage, config)


class _TarWriter:
    """A tar in a temporary file without a name, as a shard may be larger than memory.

    Raises StorageUnusableError where that file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.members = 0

    def __enter__(self) -> Self:
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile()
        except OSError as error:
            raise self._unwritable(error) from error
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, content: bytes) -> int:
        """Append a member; where in the tar its content begins."""
        member = tarfile.TarInfo(name)  # time, user and group are 0
        member.size = len(content)
        member.mode = 0o644
        try:
            begins = self._file.tell() + _HEADER
            self._tar.addfile(member, io.BytesIO(content))
        except OSError as error:
            raise self._unwritable(error) from error
        self.members += 1
        return begins

    def close(self) -> IO[bytes]:
        """End the tar; the file that holds it."""
        try:
            self._tar.close()
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        return self._file

    def _unwritable(self, error: OSError) -> StorageUnusableError:
        return StorageUnusableError(
            f"{self.path} is put together in {tempfile.gettempdir()}, which cannot be written: "
            f"{error}; set TMPDIR to another folder and run again"
        )


def _described(sample: Sample) -> bytes:
    """What a reader without the manifest is told, under the names of the manifest's columns."""
    facts = {
        "index": sample.index,
        "prompt_index": sample.prompt_index,
        **row_values(sample),
        **{PROFILE_PREFIX + name: value for name, value in sample.metadata.items()},
    }
    return json.dumps(facts, ensure_ascii=False, default=str).encode()


def _unwritten(result: Result, words: str) -> Result:
    if result.error_type is not None:
        return result
    return replace(
        result,
        file_name=None,
        bytes=None,
        sha256=None,
        pixels_sha256=None,
        tar=None,
        tar_offset=None,
        error_type="storage_error",
        error_message=words[:2000],
    )
