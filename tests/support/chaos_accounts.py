"""What a disturbed job made twice, and whether its events account for it."""

from collections import Counter
from dataclasses import dataclass

from output_checks import OutputWatcher, written_images

from jobs.epoch import read_events
from jobs.storage import Storage


@dataclass(frozen=True)
class Interruptions:
    """What the files under `events/` say of attempts that did not end by themselves."""

    leases: dict[str, dict]  # by attempt: its event
    lost: set[tuple[int, str]]  # workers that were lost, by epoch and name
    dead: set[int]  # epochs whose driver did not end in good order
    copied: dict[str, int]  # attempts of a batch that was made twice on purpose, and its samples

    @classmethod
    def of(cls, storage: Storage) -> "Interruptions":
        leases: dict[str, dict] = {}
        lost: set[tuple[int, str]] = set()
        ends: dict[int, str | None] = {}
        copied: Counter[str] = Counter()
        for event in read_events(storage):
            epoch = event["epoch"]
            ends.setdefault(epoch, None)
            match event["event"]:
                case "lease":
                    leases[event["attempt"]] = event
                    if event["copy_of"] is not None:
                        copied[event["attempt"]] += event["samples"]
                        copied[event["copy_of"]] += event["samples"]
                case "worker_died" | "worker_stalled":
                    lost.add((epoch, event["worker"]))
                case "end":
                    ends[epoch] = event["reason"]
        dead = {epoch for epoch, reason in ends.items() if reason in (None, "error")}
        return cls(leases, lost, dead, copied)

    def excuse(self, attempt: str) -> bool:
        """Whether an attempt was interrupted.

        One that no event tells of was leased just before its driver was killed, after the last
        time that events were written.
        """
        lease = self.leases.get(attempt)
        if lease is None:
            return bool(self.dead)
        return lease["epoch"] in self.dead or (lease["epoch"], lease["worker"]) in self.lost

    def samples(self, attempt: str, shard_size: int) -> int:
        lease = self.leases.get(attempt)
        return shard_size if lease is None else lease["samples"]


def check_redone(watcher: OutputWatcher, shard_size: int) -> int:
    """Images that no row names, all of which belong to attempts that were interrupted.

    Returns:
        How many there are.
    """
    storage = watcher.storage
    named = {row["file_name"] for row in watcher.rows}
    # a write whose every answer was lost is a failed row beside a whole file
    failed = Counter(row["attempt"] for row in watcher.rows if row["status"] == "failed")
    litter = Counter(path.split("/")[1] for path in written_images(storage) if path not in named)
    told = Interruptions.of(storage)
    for attempt, extra in litter.items():
        if told.excuse(attempt):
            assert extra <= told.samples(attempt, shard_size), (attempt, extra)
        else:
            allowed = failed[attempt] + told.copied.get(attempt, 0)
            assert extra <= allowed, f"{attempt} made {extra} images for nothing"
    return sum(litter.values())


def num_copied(storage: Storage) -> int:
    """Samples that were made twice on purpose, at the end of a run."""
    leases = Interruptions.of(storage).leases.values()
    return sum(lease["samples"] for lease in leases if lease["copy_of"] is not None)
