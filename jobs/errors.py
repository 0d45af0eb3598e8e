"""Exceptions of the runner with their exit codes, and the classes of a failed sample."""

from __future__ import annotations

from typing import Literal, get_args

EXIT_OK = 0
EXIT_DIFFERENCE = 1
EXIT_INPUT = 2
EXIT_FAILED_ROWS = 3
EXIT_FAILURE_RATE = 4
EXIT_UNUSABLE = 5
EXIT_IN_USE = 6
EXIT_INTERRUPTED = 130

ErrorType = Literal[
    "prompt_error",
    "invalid_image",
    "out_of_memory",
    "worker_died",
    "worker_stalled",
    "storage_error",
    "generation_error",
]
ERROR_TYPES: tuple[str, ...] = get_args(ErrorType)


class JobError(Exception):
    """Base of every error that ends a command with a message instead of a traceback."""

    exit_code: int = EXIT_UNUSABLE


class InputError(JobError):
    """A job file, profile table, prompt generator, flag or output that does not fit: exit 2."""

    exit_code = EXIT_INPUT


class FingerprintError(InputError):
    """The output folder was made by another job than the one asked for: exit 2."""


class ModelError(JobError):
    """The model cannot be loaded where it must run: exit 5."""


class DeviceUnusableError(ModelError):
    """The model cannot be run on a worker's device; on others of its node it may: exit 5."""


class ClusterError(JobError):
    """Ray cannot be reached or cannot give what the job needs: exit 5."""


class StorageError(JobError):
    """The output cannot be read or written: exit 5."""


class StorageUnusableError(StorageError):
    """No rights, a full or a read-only disk: trying again cannot help."""


class OutputInUseError(JobError):
    """Another driver that is alive owns the output: exit 6."""

    exit_code = EXIT_IN_USE


class SupersededError(OutputInUseError):
    """Another driver took a later epoch while this one was running: exit 6."""


class FailureRateError(JobError):
    """More samples failed than `run.max_failure_rate` allows: exit 4."""

    exit_code = EXIT_FAILURE_RATE
