"""From the model section of a job to a pipeline on this process's device."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jobs.checkpoint_kind import takes_pictures
from jobs.config import JobConfig
from jobs.device import device_type
from jobs.errors import InputError, ModelError
from jobs.executor import Settings
from jobs.fingerprint import node_fingerprint
from jobs.memory_needs import job_memory
from jobs.node_weights import read_ahead
from jobs.settings import resolve_batch_size, resolve_dtype
from zimage_core import (
    AttentionBackendError,
    ZImagePipeline,
    ensure_model_weights,
    load_from_local_dir,
)
from zimage_core.checkpoint import checkpoint_files
from zimage_core.compilation import CompileError
from zimage_core.quantization import QuantizationError


class PipelineLoader:
    """Finds, identifies and loads a job's weights on this node.

    Args:
        config: the job.
        worker: name of the worker, for messages.
        log: called with a line for the worker's log.
    """

    def __init__(self, config: JobConfig, worker: str, log: Callable[[str], None]) -> None:
        self.config = config
        self.worker = worker
        self._log = log

    def weights(self) -> Path:
        """The checkpoint's folder; it is fetched first where the job says from where.

        Raises:
            ModelError: there is none, it is incomplete, or fetching it failed.
        """
        model = self.config.model
        try:
            return ensure_model_weights(
                model.folder,
                model.repo,
                source=model.source,
                revision=model.revision,
                **model.parts,
            )
        except (ValueError, OSError, ImportError) as error:
            raise ModelError(f"{model.key_of(str(error))}: {error}") from error

    def fingerprint(self) -> str:
        """Content hash of the weights, as `node_fingerprint`.

        Raises:
            ModelError: they cannot be read.
        """
        return self._fingerprint(self.weights())

    def takes_pictures(self) -> bool:
        """Whether the checkpoint edits the images of prompts.

        Raises:
            ModelError: its configuration cannot be read.
        """
        model = self.config.model
        try:
            return takes_pictures(self.weights(), model.transformer)
        except (ValueError, OSError) as error:
            raise ModelError(f"{model.key_of(str(error))}: {error}") from error

    def memory_needed(self) -> dict[str, int]:
        """Bytes that should be free on the device for this job, for each way of offloading.

        Raises:
            ModelError: the checkpoint is none, or cannot make images of the job's size.
        """
        dtype = resolve_dtype(self.config, device_type())
        batch_size = resolve_batch_size(self.config)
        try:
            return job_memory(self.config, self.weights(), dtype=dtype, batch_size=batch_size)
        except ValueError as error:
            raise ModelError(str(error)) from error

    def load(self, settings: Settings) -> ZImagePipeline:
        """Load the weights that the driver planned with.

        Raises:
            ModelError: they cannot be loaded, or are others, or the device is of another kind.
            InputError: the attention backend, 8-bit weights or compiled blocks cannot run here.
        """
        path = self.weights()
        parts = self.config.model.parts
        found = self._fingerprint(path)
        if found != settings.model_fingerprint:
            raise ModelError(
                f"{path} on {socket.gethostname()} holds other weights than the job's: "
                f"{found}, planned {settings.model_fingerprint}"
            )
        if settings.device_type != device_type():
            raise ModelError(
                f"the job was planned for {settings.device_type}, but {socket.gethostname()} "
                f"offers {device_type()} to worker {self.worker}"
            )
        try:
            words = read_ahead(checkpoint_files(path, **parts))
            if words is not None:
                self._log(words)
            components = load_components(
                self.config, path, settings, settings.device_type, hint="'native' runs everywhere"
            )
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            raise ModelError(f"the model cannot be loaded: {error}") from error
        return ZImagePipeline(**components)

    def _fingerprint(self, path: Path) -> str:
        model = self.config.model
        try:
            return node_fingerprint(path, **model.parts)
        except (ValueError, OSError) as error:
            raise ModelError(f"{model.key_of(str(error))}: {error}") from error


def load_components(
    config: JobConfig, path: Path, settings: Settings, device: str, *, hint: str
) -> dict[str, Any]:
    """Load a job's models as its settings say.

    Args:
        path: folder of the weights.
        device: type of the device, which need not be the settings'.
        hint: what to say of an attention backend that cannot run.

    Raises:
        InputError: the attention backend, 8-bit weights or compiled blocks cannot run here.
        ValueError, RuntimeError, OSError, ImportError: the weights cannot be loaded.
    """
    try:
        return load_from_local_dir(
            path,
            device=torch.device(device),
            dtype=getattr(torch, settings.dtype),
            compile=settings.compile,
            attention=settings.attention,
            quantization=config.model.quantization,
            offload=settings.offload,
            fuse_weights=None,
            **config.model.parts,
        )
    except AttentionBackendError as error:
        raise InputError(f"model.attention: {error}; {hint}") from error
    except CompileError as error:
        raise InputError(f"model.compile: {error}") from error
    except QuantizationError as error:
        raise InputError(f"model.quantization: {error}") from error
