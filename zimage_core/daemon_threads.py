"""Work on several things at once that an interrupt need not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import TypeVar

_Item = TypeVar("_Item")


def for_each(
    work: Callable[[_Item], object], items: Iterable[_Item], threads: int, stop: threading.Event
) -> None:
    """Call `work` with each item, a few at once.

    The first exception, or an interrupt, sets `stop` and is raised at once. Threads that are under
    way are left behind: one that waits for a silent server could take a minute to come back. So
    `work` must not change anything any more once `stop` is set. A process ends without them.
    """
    waiting: SimpleQueue[_Item] = SimpleQueue()
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    for item in items:
        waiting.put(item)
    count = waiting.qsize()

    def run() -> None:
        while not stop.is_set():
            try:
                item = waiting.get_nowait()
            except Empty:
                return
            try:
                work(item)
            except BaseException as error:  # noqa: BLE001 - raised below
                ended.put(error)
            else:
                ended.put(None)

    for _ in range(min(threads, count)):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in range(count):
            error = ended.get()
            if error is not None:
                raise error
    except BaseException:
        stop.set()
        raise
