"""Messages from the thread that works to the one that sends them, as many at once as have gathered.

To send a message through Ray takes about half a millisecond, and as long again to receive it. Work
that waits for that is slower by it, and work that is quicker than that makes more messages than
can be sent one by one. So they are left here and taken together: a message that comes alone goes at
once, and while it is sent others gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """Nothing comes any more; or why."""

    error: BaseException | None


class Mailbox(Generic[T]):
    """Runs what makes messages on a thread, and gives them to the one that asks.

    Args:
        messages: made on that thread, one after the other.
        thread: an executor of one thread, on which all work of a device is done.
        most: messages that are taken at once.
    """

    def __init__(self, messages: Iterable[T], thread: ThreadPoolExecutor, most: int = 256) -> None:
        self._queue: SimpleQueue[T | _End] = SimpleQueue()
        self._most = most
        self._making = thread.submit(self._make, messages)

    def __iter__(self) -> Iterator[list[T]]:
        """What has gathered since, at least one message each time.

        Raises:
            BaseException: what making the messages raised, after all that were made before.
        """
        while True:
            item = self._queue.get()
            taken: list[T] = []
            while not isinstance(item, _End):
                taken.append(item)
                if len(taken) == self._most:
                    break
                try:
                    item = self._queue.get_nowait()
                except Empty:
                    break
            if taken:
                yield taken
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return

    def _make(self, messages: Iterable[T]) -> None:
        try:
            for message in messages:
                self._queue.put(message)
        except BaseException as error:  # noqa: BLE001 - is raised where the messages are taken
            self._queue.put(_End(error))
        else:
            self._queue.put(_End(None))
