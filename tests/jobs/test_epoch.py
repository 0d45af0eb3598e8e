"""One driver at a time: claims, heartbeats, succession."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest

from jobs.epoch import Epoch, event_path, host_id, newest_claim, process_start, read_events
from jobs.errors import OutputInUseError, SupersededError
from jobs.storage import Storage


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "out"), create=True)


def claim_of(storage, epoch=1, *, host=None, pid=None, started=None, age=0.0, ended=False):
    when = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
    first = {
        "event": "epoch",
        "time": when,
        "epoch": epoch,
        "host": host or host_id(),
        "pid": pid or os.getpid(),
        "started": process_start(os.getpid()) if started is None else started,
        "nonce": "n",
    }
    lines = [first, *([{"event": "end", "time": when}] if ended else [])]
    storage.put(event_path(epoch, 0), "\n".join(map(json.dumps, lines)).encode())


def test_live_driver_keeps_others_out_and_is_named(storage):
    epoch = Epoch.take(storage)
    with pytest.raises(OutputInUseError, match=f"pid {os.getpid()}, epoch 1") as caught:
        Epoch.take(storage)
    assert caught.value.exit_code == 6
    epoch.close()
    second = Epoch.take(storage)
    assert second.number == 2
    second.close()


def test_killed_driver_on_this_host_is_succeeded_at_once(storage):
    code = (
        "import os, signal\n"
        "from jobs.epoch import Epoch\nfrom jobs.storage import Storage\n"
        f"Epoch.take(Storage({str(storage.root)!r}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert newest_claim(storage).epoch == 1
    epoch = Epoch.take(storage)
    assert epoch.number == 2
    epoch.close()


def test_reused_pid_is_not_taken_for_the_driver(storage):
    claim_of(storage, pid=os.getpid(), started=1.0)
    epoch = Epoch.take(storage)
    epoch.close()


@pytest.mark.parametrize(("age", "alive"), [(5, True), (50, True), (61, False)])
def test_driver_on_another_host_lives_by_its_heartbeat(storage, age, alive):
    claim_of(storage, host="elsewhere/boot/pid", age=age)
    if alive:
        with pytest.raises(OutputInUseError, match="elsewhere"):
            Epoch.take(storage)
    else:
        Epoch.take(storage).close()


def test_driver_that_ended_is_succeeded_at_once_from_any_host(storage):
    claim_of(storage, host="elsewhere/boot/pid", age=1, ended=True)
    Epoch.take(storage).close()


def test_succeeded_driver_may_commit_nothing_more(storage):
    epoch = Epoch.take(storage)
    epoch.check()
    claim_of(storage, epoch=2, host="elsewhere/boot/pid")
    with pytest.raises(SupersededError, match="epoch 2"):
        epoch.check()
    epoch.close()


def test_of_many_at_once_exactly_one_gets_an_epoch(storage):
    barrier = threading.Barrier(8)
    taken = []

    def run():
        barrier.wait()
        with contextlib.suppress(OutputInUseError):
            taken.append(Epoch.take(storage))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [epoch.number for epoch in taken] == [1]
    taken[0].close()


def test_events_are_json_lines_in_order_and_roll_over(storage, monkeypatch):
    monkeypatch.setattr("jobs.epoch._MAX_FILE", 500)
    epoch = Epoch.take(storage)
    for number in range(20):
        epoch.event("lease", shard=number, attempt="00000000-a", worker="w")
        epoch.flush()
    epoch.close(reason="done")
    assert len(list(storage.names("events"))) > 1
    events = read_events(storage)
    assert [e["shard"] for e in events if e["event"] == "lease"] == list(range(20))
    assert events[0]["event"] == "epoch"
    assert events[-1]["event"] == "end"
    assert newest_claim(storage).ended
