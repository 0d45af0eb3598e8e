"""Claims, commits and whole jobs on a real S3 server whose traffic is broken on purpose."""

import io
import os
import signal
import threading
from contextlib import suppress
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest
from fault_proxy import Fault, FaultProxy, seeded
from job_runs import kill_session, read_hashes, wait_for
from s3_server import s3_environment

from jobs import epoch as epoch_module
from jobs import storage as storage_module
from jobs.cli import main
from jobs.commits import Listing, PartName, write_part
from jobs.epoch import Epoch, newest_claim, read_events
from jobs.errors import OutputInUseError, StorageError, SupersededError
from jobs.manifest import ManifestRow
from jobs.storage import Storage

LOST = [Fault.DROP_AFTER, Fault.FAIL_AFTER]
RATES = {
    Fault.UNAVAILABLE: 0.03,
    Fault.DROP_BEFORE: 0.03,
    Fault.DROP_AFTER: 0.03,
    Fault.FAIL_AFTER: 0.03,
    Fault.CUT: 0.03,
}


@pytest.fixture
def other_host(monkeypatch):
    """Act for a moment as a driver on another machine, where heartbeats alone tell who lives."""

    def act(uri: str, *, dead_after: float) -> Epoch:
        with monkeypatch.context() as there:
            there.setattr(epoch_module, "host_id", lambda: "elsewhere/boot/pid")
            there.setattr(epoch_module, "DEAD_AFTER", dead_after)
            return Epoch.take(Storage(uri))

    return act


def row(index: int, worker: str) -> ManifestRow:
    return ManifestRow(
        file_name=f"images/00000000-{worker}/x_{index:08d}.png",
        index=index,
        prompt_index=index,
        status="ok",
        prompt="p",
        negative_prompt=None,
        seed=index,
        width=16,
        height=16,
        num_inference_steps=8,
        guidance_scale=0.0,
        model="m",
        model_fingerprint="sha256:0",
        loras=None,
        dtype="float32",
        attention="native",
        format="png",
        bytes=1,
        sha256="aa",
        pixels_sha256="bb",
        shard=0,
        revision=0,
        attempt=f"00000000-{worker}",
        batch=(index,),
        batch_mode="planned",
        worker=worker,
        node="n",
        device="cpu",
        seconds=0.1,
        error_type=None,
        error_message=None,
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        metadata={},
    )


def part(epoch: int, *, rows: int = 4, last: int = 1) -> PartName:
    return PartName(0, 0, 0, last, 2, rows, 0, 0, epoch)


@pytest.mark.parametrize("fault", [*LOST, Fault.DROP_BEFORE, Fault.UNAVAILABLE])
def test_claim_whose_answer_is_lost_is_the_drivers_own(uri, proxy, fault):
    proxy.once("PUT", "events/000001-00000", fault, times=2)
    epoch = Epoch.take(Storage(uri))
    assert epoch.number == 1
    assert newest_claim(epoch.storage).nonce == epoch.nonce
    epoch.close()
    assert len(proxy.requests("PUT", "events/000002")) == 0


@pytest.mark.parametrize("fault", [None, Fault.DROP_BEFORE, Fault.FAIL_AFTER])
def test_of_two_takers_the_one_that_comes_second_is_kept_out(uri, proxy, other_host, fault):
    """B claims the epoch while A's claim is on its way; A's own lost answer must not mislead it."""
    taken = []
    rival = lambda: taken.append(other_host(uri, dead_after=60))  # noqa: E731
    if fault is Fault.DROP_BEFORE:  # A's first try never arrives, and B comes before the second
        proxy.once("PUT", "events/000001-00000", fault)
    proxy.once(
        "PUT",
        "events/000001-00000",
        Fault.FAIL_AFTER if fault is Fault.FAIL_AFTER else None,
        before=rival,
    )
    with pytest.raises(OutputInUseError, match="a driver on elsewhere"):
        Epoch.take(Storage(uri))
    assert [epoch.number for epoch in taken] == [1]
    assert newest_claim(Storage(uri)).nonce == taken[0].nonce
    taken[0].close()


def test_of_many_takers_under_faults_exactly_one_gets_the_epoch(uri, proxy):
    proxy.schedule = seeded(11, RATES)
    barrier = threading.Barrier(6)
    taken = []

    def run() -> None:
        storage = Storage(uri)
        barrier.wait()
        with suppress(OutputInUseError):
            taken.append(Epoch.take(storage))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [epoch.number for epoch in taken] == [1]
    proxy.schedule = lambda _: None
    assert newest_claim(Storage(uri)).nonce == taken[0].nonce
    taken[0].close()


def test_superseded_driver_commits_nothing_more(uri, other_host):
    first = Epoch.take(Storage(uri))
    with pytest.raises(OutputInUseError):
        other_host(uri, dead_after=60)
    second = other_host(uri, dead_after=-1)
    assert second.number == 2
    with pytest.raises(SupersededError, match="epoch 2"):
        first.check()
    second.check()
    first.close()
    second.check()  # a late last word of the old driver changes nothing
    assert newest_claim(Storage(uri)).epoch == 2
    second.close()


@pytest.mark.parametrize("fault", [None, *LOST])
def test_commit_that_is_overtaken_on_its_way_neither_wins_nor_duplicates(
    uri, proxy, other_host, fault
):
    """The old driver looks, is alone, and sends; before its part arrives the next one has taken
    over and committed the same shard."""
    first = Epoch.take(Storage(uri))

    def take_over() -> None:
        second = other_host(uri, dead_after=-1)
        write_part(Storage(uri), part(second.number), [row(i, "new") for i in range(4)])
        second.close()

    first.check()
    proxy.once("PUT", "manifest/.*e000001", fault, before=take_over)
    write_part(first.storage, part(first.number, rows=2, last=0), [row(0, "old"), row(1, "old")])
    with pytest.raises(SupersededError):
        first.check()
    first.close()
    listing = Listing(Storage(uri))
    assert {p.epoch for p in listing.parts[0]} == {1, 2}
    assert (listing.num_rows, listing.num_failed) == (4, 0)
    assert listing.current(0)["worker"].to_pylist() == ["new"] * 4


@pytest.mark.parametrize("fault", LOST)
def test_commit_whose_answer_is_lost_counts_once(uri, proxy, fault):
    storage = Storage(uri)
    proxy.once("PUT", "manifest/", fault, times=2)
    write_part(storage, part(1), [row(i, "w") for i in range(4)])
    assert len(proxy.requests("PUT", "manifest/")) == 3
    assert list(storage.names("manifest")) == [str(part(1))]
    with pytest.raises(StorageError, match="exists already"):
        write_part(storage, part(1), [row(i, "other") for i in range(4)])
    assert Listing(storage).current(0)["worker"].to_pylist() == ["w"] * 4


def test_commit_that_is_given_up_may_have_arrived_and_is_found(uri, proxy, monkeypatch):
    monkeypatch.setattr(storage_module, "_BUSY_SECONDS", 0.2)
    storage = Storage(uri)
    storage.exists("job.json")
    proxy.schedule = lambda r: Fault.FAIL_AFTER if r.method == "PUT" else None
    # every answer is lost, also that to the question whether the object there is its own
    proxy.once("GET", "manifest/", Fault.UNAVAILABLE, times=1000)
    with pytest.raises(StorageError, match="cannot create"):
        write_part(storage, part(1), [row(i, "w") for i in range(4)])
    with FaultProxy(proxy._upstream) as clean:
        for name, value in s3_environment(clean.port).items():
            monkeypatch.setenv(name, value)
        listing = Listing(Storage(uri))
        assert listing.num_rows == 4
        assert listing.current(0)["worker"].to_pylist() == ["w"] * 4


def test_slow_store_does_not_hold_up_events(uri, proxy, monkeypatch):
    monkeypatch.setattr(epoch_module, "HEARTBEAT", 3600)
    epoch = Epoch.take(Storage(uri))
    held = threading.Event()
    go_on = threading.Event()

    def hold() -> None:
        held.set()
        go_on.wait(30)

    proxy.once("PUT", "events/000001-00000", before=hold)
    epoch.event("one")
    beat = threading.Thread(target=epoch.flush)
    beat.start()
    assert held.wait(30)
    epoch.event("two")  # returns while the write is under way
    go_on.set()
    beat.join()
    epoch.close()
    assert [e["event"] for e in read_events(epoch.storage)] == ["epoch", "one", "two", "end"]


@pytest.mark.long
@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_job_killed_under_faults_ends_with_the_local_jobs_images(
    make_job, proxy, uri, layout, capsys
):
    reference = make_job(count=24, name="reference")
    assert main(["run", str(reference.path), "--local"]) == 0
    expected = read_hashes(reference.output)

    job = make_job(count=24, steps=2)
    flags = ["--local", "--output", uri, "--set", f"output.layout={layout}"]
    storage = Storage(uri)
    proxy.schedule = seeded(5, RATES)
    process = job.start(*flags)
    try:
        wait_for(lambda: len(list(storage.names("manifest"))) >= 2)
        os.killpg(process.pid, signal.SIGKILL)
    finally:
        kill_session(process)
    kept = set(storage.names("manifest"))
    capsys.readouterr()
    assert main(["run", str(job.path), *flags]) == 0
    assert f"{4 * len(kept)} images kept" in capsys.readouterr().err
    assert proxy.faults.total() > 10
    assert kept <= set(storage.names("manifest"))
    assert len(list(storage.names("manifest"))) == 6

    for verb in ("status", "verify", "gc"):
        assert main([verb, uri]) == 0
    assert main(["run", str(job.path), *flags]) == 0
    assert "nothing to make" in capsys.readouterr().err
    proxy.schedule = lambda _: None
    rows = pq.read_table(io.BytesIO(storage.get("metadata.parquet"))).to_pylist()
    assert [r["index"] for r in rows] == list(range(24))
    assert {r["index"]: r["pixels_sha256"] for r in rows} == expected
    committed = [r for p in kept for r in _rows(storage, p)]
    assert {r["index"]: r["attempt"] for r in committed}.items() <= {
        r["index"]: r["attempt"] for r in rows
    }.items()


def test_errors_of_the_store_end_a_run_with_one_line_and_code_5(
    make_job, proxy, monkeypatch, capsys
):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    job = make_job(count=2)
    for flags, words in (
        (["--output", "s3://no-such-bucket/out"], "there is no bucket 'no-such-bucket'"),
        (["--output", "az://container/out"], "set AZURE_STORAGE_ACCOUNT_NAME"),
    ):
        assert main(["run", str(job.path), "--local", *flags]) == 5
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("zimage run: ") and words in line


def _rows(storage: Storage, name: str) -> list[dict]:
    return pq.read_table(io.BytesIO(storage.get(f"manifest/{name}"))).to_pylist()
