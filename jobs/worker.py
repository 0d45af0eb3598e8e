"""`GenerationWorker`: owns one pipeline on one device and turns leases into images on storage.

A plain class that knows nothing of Ray. All model work is done on the thread that calls `run`;
encoding to PNG, hashing and writing go to a small pool, so that they overlap with the next batch.
What happens to a batch on the device is in `batch_stages`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from jobs.batch_images import BatchImages
from jobs.batch_maker import BatchMaker, Pending
from jobs.batch_stages import BatchStages
from jobs.canaries import CanaryReport
from jobs.canary import fly_canary
from jobs.capabilities import device_capabilities
from jobs.claims import Claims
from jobs.config import JobConfig
from jobs.device import DeviceError, describe_device, is_device_failure, works_beside_host
from jobs.errors import DeviceUnusableError, StorageError
from jobs.executor import (
    Finished,
    Lease,
    Message,
    Result,
    Settings,
    WorkerInfo,
    WorkerSpec,
)
from jobs.host_memory import keep_freed_memory
from jobs.image_faults import ImageFault
from jobs.input_images import check_images
from jobs.lease_plan import plan_lease
from jobs.loras import load_loras
from jobs.pipeline_loader import PipelineLoader
from jobs.plan import Sample, job_generator
from jobs.settings import resolve_dtype
from jobs.stage_clock import StageClock
from jobs.storage import Storage
from jobs.tar_output import image_output
from jobs.worker_log import WorkerLog
from jobs.writers import Pixels
from prompt_generators import PromptGenerator
from zimage_core import ZImagePipeline

_PENDING_BYTES = 512 * 1024 * 1024  # pixels waiting to be written before the device must wait


class GenerationWorker:
    """One pipeline on one device.

    Args:
        spec: the job and its output.
        name: of this worker, in rows and logs.
        stop: whether to drain, for a driver in the same process that cannot call meanwhile.
    """

    def __init__(
        self, spec: WorkerSpec, name: str, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.spec = spec
        self.name = name
        self.config = JobConfig.model_validate_json(spec.config)
        self.storage = Storage(spec.output_uri)
        self.log = WorkerLog(self.storage, f"logs/{spec.epoch:06d}-{name}.log")
        self._steps = 0
        self._draining = threading.Event()
        self._stop = stop
        self._loader = PipelineLoader(self.config, name, self.log.write)
        self._pipeline: ZImagePipeline | None = None
        self._stages: BatchStages | None = None
        self._generator: PromptGenerator | None = None
        self._settings: Settings | None = None
        self._clock: StageClock | None = None
        self._claims = Claims()
        self._following: Sequence[Sample] = ()  # the batch to encode ahead
        self._images = image_output(self.storage, self.config)
        self._maker = BatchMaker(
            read=self._read,
            generate=lambda batch: self._generate(batch),
            again=self._generate_in_float32,
            images=self._images,
            log=self.log.write,
        )

    @property
    def ticks(self) -> int:
        """Goes up with every step of work: what a heartbeat reports."""
        return self._steps + self._images.written

    def describe(self) -> WorkerInfo:
        """Where this worker runs, and what can run there. Loads nothing."""
        info = describe_device()
        dtype = resolve_dtype(self.config, info.device_type)
        found = device_capabilities(self.config, info.device_type, dtype)
        return replace(info, attention=found.attention, compiles=found.compiles)

    def fingerprint(self) -> str:
        """Content hash of the weights; fetches them first where the job says from where."""
        return self._loader.fingerprint()

    def takes_pictures(self) -> bool:
        """Whether the checkpoint edits the images of prompts. Raises as `fingerprint`."""
        return self._loader.takes_pictures()

    def memory_needed(self) -> dict[str, int]:
        """Bytes that should be free on the device for this job, for each way of offloading.

        Raises:
            ModelError: the checkpoint is none, or cannot make images of the job's size.
        """
        return self._loader.memory_needed()

    def load(self, settings: Settings) -> CanaryReport:
        """Load model and generator, see that the output is the driver's, and fly the canary.

        Raises:
            ModelError: the checkpoint or an adapter cannot be loaded, or is another than the
                driver's, or the device fails on a first image.
            InputError: the attention backend, 8-bit weights or compiled blocks cannot run here, an
                adapter does not fit the model, or the generator cannot be made.
            StorageError: this node does not see the driver's output.
        """
        started = time.perf_counter()
        self._settings = self._images.settings = settings
        self._check_output()
        check_images(self.config, settings.takes_pictures, node=socket.gethostname())
        torch.set_num_threads(settings.threads_per_worker)
        if settings.device_type == "cpu":
            keep_freed_memory()
        self._pipeline = self._loader.load(settings)
        self._clock = self._images.clock = StageClock(settings.device_type)
        self._stages = BatchStages(
            self._pipeline,
            clock=self._clock,
            loras=load_loras(self.config, self._pipeline.transformer, settings.loras),
            scales={name: lora.scale for name, lora in self.config.model.loras.items()},
            sampling=self.config.sampling,
            images_root=self.config.prompts.images_root,
            takes_pictures=settings.takes_pictures,
            on_step=self._tick,
            log=self.log.write,
        )
        self._generator = job_generator(self.config, self.spec.working_dir)
        self.log.write(
            f"loaded {self.config.model.folder} ({settings.dtype}, attention {settings.attention}, "
            f"compile {settings.compile}, offload {settings.offload}) on {settings.device_type} in "
            f"{time.perf_counter() - started:.1f} s"
        )
        return self._canary()

    def trim(self, attempt: str, indices: Sequence[int]) -> tuple[int, ...]:
        """Give up batches of a lease that are not begun; the samples that were given up.

        Safe to call from another thread.
        """
        return self._claims.give_up(attempt, indices)

    def drain(self) -> None:
        """End every lease after the batch under way."""
        self._draining.set()

    @property
    def draining(self) -> bool:
        """Whether to begin no further batch."""
        return self._is_draining()

    def run(self, lease: Lease) -> Iterator[Message]:
        """Make the wanted samples of a lease, batch by batch.

        Yields:
            `Planned` first, then `Finished` for each batch in order, as soon as its images are
            on the output; less of them if drained.

        Raises:
            DeviceError: the device failed in a way that only a new process mends.
        """
        yield from self._images.deliver(lease.attempt, self._run(lease))

    def _run(self, lease: Lease) -> Iterator[Message]:
        assert self._settings is not None and self._stages is not None
        assert self._pipeline is not None
        if self.draining:
            return
        torch.set_num_threads(self._settings.threads_per_worker)  # counts for this thread alone
        self.log.write(
            f"shard {lease.shard.id} attempt {lease.attempt}: {len(lease.wanted)} samples"
        )
        assert self._generator is not None
        plan = plan_lease(
            lease,
            config=self.config,
            generator=self._generator,
            caption_lengths=self._pipeline.caption_lengths,
            batch_size=self._settings.batch_size,
            takes_pictures=self._settings.takes_pictures,
            on_sample=self._tick,
        )
        yield plan.message
        wanted = set(lease.wanted)
        batches = [b for b in plan.batches if wanted.intersection(s.index for s in b)]
        if self._maker.singles:
            batches = [[s] for batch in batches for s in batch if s.index in wanted]
        of_batch = {b[0].index: [s.index for s in b if s.index in wanted] for b in batches}
        self._claims.plan(lease.attempt, of_batch.values())

        def begin(batch: Sequence[Sample]) -> bool:
            return self._claims.begin(lease.attempt, of_batch[batch[0].index])

        in_phases = self._settings.offload == "phase"
        if in_phases:
            self._denoise_all([b for b in batches if b[0].index not in plan.failures], begin)
        # Where a batch may take the process with it, no other is begun before it is done.
        ahead = works_beside_host(self._settings.device_type) and not (lease.isolate or in_phases)
        nexts = [b if ahead and b[0].index not in plan.failures else () for b in batches[1:]]
        pending: deque[tuple[list[Pending], int]] = deque()
        for batch, following in zip(batches, [*nexts, ()], strict=True):
            if self._is_draining() and not (in_phases and self._stages.is_denoised(batch)):
                continue  # with phases, what is denoised is under way
            if not begin(batch):
                continue  # another worker makes it
            failure = plan.failures.get(batch[0].index)
            if failure is not None:
                results: list[Pending] = [failure]
                size = 0
            else:
                self._following = () if self._is_draining() else following
                results, size = self._maker.make(lease, batch, wanted)
            pending.append((results, size))
            while pending and (
                all(isinstance(r, Result) or r.done() for r in pending[0][0])
                or sum(entry[1] for entry in pending) > _PENDING_BYTES
            ):
                yield self._finish(pending.popleft(), wanted)
        while pending:
            yield self._finish(pending.popleft(), wanted)
        self._claims.forget(lease.attempt)
        self.log.flush()

    def _is_draining(self) -> bool:
        return self._draining.is_set() or self._stop()

    def close(self) -> None:
        """Flush the log and end the writer threads."""
        self._images.close()
        self.log.flush()

    def _denoise_all(
        self, batches: Sequence[Sequence[Sample]], begin: Callable[[Sequence[Sample]], bool]
    ) -> None:
        assert self._stages is not None
        try:
            self._stages.denoise_all(batches, self._is_draining, begin)
        except Exception as error:
            if is_device_failure(error):
                raise DeviceError(str(error)) from error
            raise

    def _read(self, batch: Sequence[Sample]) -> BatchImages:
        """What samples are made from."""
        assert self._stages is not None
        return self._stages.read(batch)

    def _generate(self, batch: Sequence[Sample]) -> list[Pixels | ImageFault]:
        """Pixels uint8 (H, W, 3) of samples made together, or why they are no image."""
        assert self._stages is not None
        following = self._following if self._maker.is_last_part else ()
        return self._stages.make(batch, self._maker.inputs, following)

    def _generate_in_float32(self, sample: Sample) -> Pixels | ImageFault | None:
        """A sample made alone in float32; None where the job is in float32 anyway."""
        assert self._stages is not None and self._settings is not None
        if self._settings.dtype == "float32":
            return None
        return self._stages.make_in_float32(sample, self._maker.inputs)

    def _canary(self) -> CanaryReport:
        assert self._pipeline is not None
        try:
            report = fly_canary(self._pipeline, self._tick)
        except DeviceError as error:
            raise DeviceUnusableError(
                f"the device of worker {self.name} on {socket.gethostname()} fails on a first "
                f"image: {error}"
            ) from error
        self._maker.singles = not report.batches_agree
        facts = ", ".join(f"{key} {value}" for key, value in report.facts().items())
        self.log.write(f"canary: {report.words() or facts}")
        return report

    def _finish(self, entry: tuple[list[Pending], int], wanted: set[int]) -> Finished:
        futures, _ = entry
        results = [r if isinstance(r, Result) else r.result() for r in futures]
        for result in results:
            if result.error_type is not None:
                words = f"{result.error_type}: {result.error_message}"
                self.log.write(f"sample {result.index}: {words}")
        wanted_ones = tuple(r for r in results if r.index in wanted)
        return Finished(wanted_ones, self._clock.take() if self._clock else {})

    def _tick(self, _: int) -> None:
        self._steps += 1

    def _check_output(self) -> None:
        path = f"events/{self.spec.epoch:06d}-00000.jsonl"
        content = self.storage.get(path)
        if content is None or self.spec.nonce.encode() not in content:
            raise StorageError(
                f"the output {self.spec.output_uri} is not the same place on "
                f"{socket.gethostname()} as on the driver's node; use a shared path or an "
                "object store"
            )
