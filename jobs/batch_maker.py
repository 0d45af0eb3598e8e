"""From a batch to its results, and what to do where it cannot be made as planned.

Out of memory: halved, down to one. Anything else that it raises: its samples alone. No image in 16
bits: that sample alone once more, in float32.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from jobs.batch_images import BatchImages
from jobs.device import DeviceError, empty_cache, is_device_failure, is_out_of_memory
from jobs.errors import ErrorType
from jobs.executor import Lease, Result
from jobs.image_faults import ImageFault
from jobs.image_output import ImageOutput, Made
from jobs.manifest import BatchMode
from jobs.plan import Sample
from jobs.writers import Pixels

Pending = Future[Result] | Result


class BatchMaker:
    """Makes batches on one device and hands their pixels to the writers.

    Args:
        read: reads the images that samples are made from.
        generate: makes samples together; pixels of each, or why there are none.
        again: makes one sample alone in float32; None from it where the job is so anyway.
        images: writes them.
        log: called with a line for the worker's log.
    """

    def __init__(
        self,
        *,
        read: Callable[[Sequence[Sample]], BatchImages],
        generate: Callable[[list[Sample]], Sequence[Pixels | ImageFault]],
        again: Callable[[Sample], Pixels | ImageFault | None],
        images: ImageOutput,
        log: Callable[[str], None],
    ) -> None:
        self._read = read
        self._generate = generate
        self._again = again
        self._images = images
        self._log = log
        self.inputs = BatchImages()
        self.is_last_part = True  # whether what is made now ends its batch
        self.singles = False  # each sample alone, where batches are not to be trusted

    def make(
        self, lease: Lease, batch: Sequence[Sample], wanted: set[int]
    ) -> tuple[list[Pending], int]:
        """Make a batch; a result for each wanted sample, and the bytes that wait to be written.

        Samples that are not wanted are made for their neighbours' sake alone: their rows are there.

        Raises:
            DeviceError: the device failed in a way that only a new process mends.
        """
        first_mode: BatchMode = "single" if lease.isolate or self.singles else "planned"
        self.inputs = self._read(batch)
        results: list[Pending] = [
            Made(index, lease.attempt, (index,), first_mode).failed("prompt_error", message)
            for index, message in self.inputs.faults.items()
        ]
        usable = [sample for sample in batch if sample.index not in self.inputs.faults]
        queue: deque[tuple[list[Sample], BatchMode]] = deque()
        if wanted.intersection(sample.index for sample in usable):
            queue.append((usable, first_mode))
        size = 0
        while queue:
            part, mode = queue.popleft()
            self.is_last_part = not queue
            indices = tuple(sample.index for sample in part)
            started = time.perf_counter()
            try:
                images = self._generate(part)
            except Exception as error:  # noqa: BLE001 - one bad sample is a row
                refuse_device_failure(error)
                out_of_memory = is_out_of_memory(error)
                if out_of_memory:
                    empty_cache()
                if len(part) == 1:
                    kind: ErrorType = "out_of_memory" if out_of_memory else "generation_error"
                    made = Made(part[0].index, lease.attempt, indices, mode)
                    results.append(made.failed(kind, f"{type(error).__name__}: {error}"))
                elif out_of_memory:
                    half = len(part) // 2
                    queue.extendleft([(part[half:], "halved"), (part[:half], "halved")])
                else:
                    queue.extendleft([([sample], "single") for sample in reversed(part)])
                continue
            seconds = (time.perf_counter() - started) / len(part)
            for sample, image in zip(part, images, strict=True):
                if sample.index not in wanted:
                    continue
                made = Made(sample.index, lease.attempt, indices, mode, seconds)
                if isinstance(image, ImageFault):
                    made, image = self._second_try(sample, made, image)
                if isinstance(image, ImageFault):
                    results.append(made.failed("invalid_image", image.message))
                    continue
                size += image.nbytes
                results.append(self._images.submit(sample, made, image))
        return results, size

    def _second_try(
        self, sample: Sample, made: Made, fault: ImageFault
    ) -> tuple[Made, Pixels | ImageFault]:
        """Once more in float32 where 16 bits may have been too few; how, and what came of it."""
        started = time.perf_counter()
        try:
            image = self._again(sample)
        except Exception as error:  # noqa: BLE001 - the fault stands, and says it
            refuse_device_failure(error)
            if is_out_of_memory(error):
                empty_cache()
            words = f"{type(error).__name__}: {error}"
            return made, ImageFault(f"{fault.message}; the second try in float32 failed: {words}")
        if image is None:
            return made, fault
        if isinstance(image, ImageFault):
            return made, ImageFault(f"{fault.message}; made alone in float32: {image.message}")
        seconds = made.seconds + time.perf_counter() - started
        self._log(f"sample {sample.index}: {fault.message}; made alone and in float32")
        alone = Made(made.index, made.attempt, (made.index,), "single", seconds, "float32")
        return alone, image


def refuse_device_failure(error: Exception) -> None:
    """Raise DeviceError for an error of a device that only a new process mends."""
    if is_device_failure(error):
        raise DeviceError(str(error)) from error
