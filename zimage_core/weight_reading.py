"""Many weights at once: several files, and parts of large ones, on a few threads.

A disk or a network gives more to several readers than to one, and copying lets go of Python's lock.
What is read depends on none of it: each weight has memory of its own, and the threads never meet.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from zimage_core.stored_tensor import Weight, WeightReader, in_file_order

# More only take memory and processor time from others: each holds a piece of a file.
MAX_READERS = 4
_RUN = 1 << 28  # bytes of a file that one thread reads in a row

Key = TypeVar("Key")
Read = Callable[[WeightReader, Key, Weight], Tensor]


def read_weights(
    weights: Mapping[Key, Weight], read: Read[Key], *, readers: int = MAX_READERS
) -> dict[Key, Tensor]:
    """Read weights on a few threads, none of which outlives the call.

    Args:
        weights: by any key.
        read: what gives the tensor of a weight; called from several threads, each with a reader of
            its own, and with torch's threads divided between them.
        readers: at most so many threads; no more than there are cores, or runs to read.

    Returns:
        Tensors by key, in the order of `weights`.

    Raises:
        CheckpointError: as `read` raises it: of several the one that comes first in the files.
    """
    runs = list(_runs(weights))
    stop = threading.Event()

    def read_run(run: list[tuple[Key, Weight]]) -> dict[Key, Tensor]:
        tensors: dict[Key, Tensor] = {}
        with WeightReader() as reader:
            for key, weight in run:
                if stop.is_set():
                    break
                tensors[key] = read(reader, key, weight)
        return tensors

    found: dict[Key, Tensor] = {}
    with _readers(min(readers, os.cpu_count() or 1, max(1, len(runs)))) as pool:
        try:
            for tensors in pool.map(read_run, runs):
                found |= tensors
        except BaseException:
            stop.set()  # leaving waits for the threads
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {key: found[key] for key in weights}


def _runs(weights: Mapping[Key, Weight]) -> Iterator[list[tuple[Key, Weight]]]:
    """Weights that lie near each other in one file, in their order there."""
    run: list[tuple[Key, Weight]] = []
    for key, weight in in_file_order(weights.items()):
        if run:
            first = run[0][1].stored
            stored = weight.stored
            if stored.file != first.file or stored.offset - first.offset >= _RUN:
                yield run
                run = []
        run.append((key, weight))
    if run:
        yield run


@contextmanager
def _readers(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads that together use as many of torch's own as this one does."""
    threads = torch.get_num_threads()
    share = max(1, threads // count)
    if share == threads:
        with ThreadPoolExecutor(count) as pool:
            yield pool
        return
    try:
        with ThreadPoolExecutor(
            count, initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # what is set on one thread counts for all later ones
