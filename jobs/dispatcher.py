"""Which worker gets which lease, and when: shards first, then the ends of what others hold."""

from __future__ import annotations

from collections.abc import Callable

from jobs.executor import Executor, Lease
from jobs.scheduler import Scheduler


class Dispatcher:
    """Keeps the workers of an executor busy.

    Args:
        scheduler: has the work.
        executor: has the workers.
        on_lease: called with each lease and the name of the worker that got it.
        on_trim: called with each lease of which something is asked back, and the samples.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        on_lease: Callable[[Lease, str], None] = lambda lease, worker: None,
        on_trim: Callable[[Lease, tuple[int, ...]], None] = lambda lease, indices: None,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._on_lease = on_lease
        self._on_trim = on_trim

    def hand_out(self) -> None:
        """Give every worker that has room something to do, as long as there is anything."""
        self._hand_out_shards()
        if not self._scheduler.remaining(1) and self._divide():
            self._hand_out_shards()

    def _hand_out_shards(self) -> None:
        """Fill idle workers first; a second lease each only while there is plenty of work."""
        scheduler, executor = self._scheduler, self._executor
        while executor.free():
            idle = executor.idle()
            plenty = scheduler.remaining(executor.num_workers + 1)
            if not plenty or (not idle and plenty <= executor.num_workers):
                return
            lease = scheduler.next()
            if lease is None:
                return
            worker = executor.submit(lease, scheduler.pace.fastest(idle))
            scheduler.assigned(lease, worker)
            self._on_lease(lease, worker)

    def _divide(self) -> bool:
        """Find something for each idle worker; whether any of it can be leased at once."""
        idle = sorted(self._executor.idle(), key=self._scheduler.pace.seconds)
        # What was asked for and not answered yet is for the first of them.
        for thief in idle[self._scheduler.num_asked :]:
            asked = self._scheduler.split(thief)
            if asked is None:
                break  # nor is there anything for a slower one
            self._executor.trim(*asked)
            self._on_trim(*asked)
        return bool(self._scheduler.remaining(1))
