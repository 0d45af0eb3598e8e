"""`zimage report`: the numbers of an output, what looks alike, and text that stays text."""

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import hostile_outputs as hostile
import numpy as np
import pytest
from cli_calls import CommandLine
from gallery_output import BEGUN, SHARD, make_output, picture, row
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobs.commits import PartName, write_part
from jobs.errors import ERROR_TYPES
from jobs.lookalikes import look_alikes, look_at
from jobs.output import Output
from jobs.page import Paragraph, Table, html_page, markdown_page, markdown_text
from jobs.quantities import duration
from jobs.report_facts import Maker, Runs, rates, read_facts, read_runs
from jobs.report_sections import times
from jobs.terminal import visible_line

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a | b | c",
    "line\nbreak\r\n| x |",
    "`code` **bold** [a](http://evil.example) ![i](x)",
    "\u202egpj.exe\x1b[2J",
    "</td></tr></table><h1>owned",
    "&lt;b&gt; \\| \\",
    "javascript:alert(1) www.evil.example a@b.example $x$ ~~gone~~ #1",
]


class Tags(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self._open:
            self.cells[-1] += data


def cells(line: str) -> list[str]:
    """The cells of a row in Markdown, as a reader sees them."""
    parts = re.split(r"(?<!\\)(?:\\\\)*\|", line.strip())[1:-1]
    return [unescaped(part.strip()) for part in parts]


def unescaped(text: str) -> str:
    """What Markdown shows where a backslash is before each character with a meaning."""
    return re.sub(r"\\(\W|_)", r"\1", text)


def table_rows(text: str, first: str) -> dict[str, list[str]]:
    """Rows of Markdown tables by their first cell, from a heading on."""
    section = text.split(f"\n## {first}\n", 1)[1].split("\n## ", 1)[0]
    rows = [cells(line) for line in section.splitlines() if line.startswith("|")]
    return {found[0]: found[1:] for found in rows}


def test_counts_and_times_of_a_half_written_output(zimage: CommandLine) -> None:
    make_output("out", 600, made=250)
    rows = -(-250 // SHARD) * SHARD  # whole shards are made
    bad = range(96, rows, 97)
    out = zimage("report", "out", "--format", "md", "-o", "r.md", "--compare", "0", code=0).out
    assert f"faces: {rows - len(bad)} of 600 images, {len(bad)} failed\n" in out
    assert f"failures  {len(bad)} invalid_image\n" in out
    assert "written   r.md, with 2 plots beside it" in out
    text = (zimage.folder / "r.md").read_text()
    samples = table_rows(text, "Samples")
    assert samples["made"] == [f"{rows - len(bad)}", f"{(rows - len(bad)) / 600:.1%}"]
    assert samples["not made yet"] == [f"{600 - rows}", f"{1 - rows / 600:.1%}"]
    failures = table_rows(text, "Failures")
    message = "the image is of one flat colour, rgb(0, 0, 0)"
    assert failures["invalid_image"] == [f"{len(bad)}", "100.0%", f"{message} ({len(bad)})"]
    assert failures["96"][:2] == ["invalid_image", message] and "193" in failures
    assert "\n    zimage run jobs/faces.yaml --output out --retry-failed\n" in text
    seconds = table_rows(text, "Time")
    assert seconds["seconds for an image, median"] == ["1"]
    assert seconds["from the first image to the last"] == [duration(rows - 1)]
    even = [0.5 + index % 10 / 10 for index in range(0, rows, 2) if index not in bad]
    failed = sum(index % 2 == 0 for index in bad)
    worker = [f"{len(even)}", f"{sum(even) / len(even):.3g}", f"{failed}"]
    assert table_rows(text, "Devices and workers")["w0"][2:] == worker
    slowest = table_rows(text, "Slowest images")
    assert [*slowest][2:] == [str(index) for index in range(9, 100, 10)]
    assert slowest["9"][:2] == ["1.4", "1.4"]
    for name in ("rate", "seconds"):
        assert f"](r-{name}.svg)" in text
        assert (zimage.folder / f"r-{name}.svg").read_text().startswith("<?xml")


def test_only_failures(zimage: CommandLine) -> None:
    storage = make_output("out", 30, made=0)
    rows = []
    for index in range(30):
        made = row(storage, index)
        kind = ERROR_TYPES[index % 7]
        failed = {"status": "failed", "file_name": None, "seconds": None, "error_type": kind}
        words = f"cause {index // 7}\n  Traceback: more"
        rows.append(replace(made, **failed, error_message=words, sha256=None, pixels_sha256=None))
    write_part(storage, PartName(0, 0, 0, 0, 1, 30, 30, 0, 1), rows)
    out = zimage("report", "out", code=0).out
    assert "faces: 0 of 30 images, 30 failed\n" in out
    page = (zimage.folder / "out/report.html").read_text()
    found = Tags(page)
    assert "No image is made yet." in page and 'alt="Failed samples by error_type"' in page
    place = found.cells.index("prompt_error")
    assert found.cells[place + 1 : place + 3] == ["5", "16.7%"]
    assert found.cells[place + 3] == "cause 0cause 1cause 2"  # a line each, the first three


def test_nothing_made_yet(zimage: CommandLine) -> None:
    make_output("out", 30, made=0)
    out = zimage("report", "out", code=0).out
    assert "faces: 0 of 30 images, 0 failed\nalike     0 images like" in out
    page = (zimage.folder / "out/report.html").read_text()
    assert "No image is made yet." in page and "No sample failed." in page


def test_text_stays_text(zimage: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # plots have no text of others
    prompts = {index * 10 + 9: text for index, text in enumerate(HOSTILE)}  # the slowest
    make_output("out", 100, prompts={**prompts, 96: HOSTILE[1]})
    zimage("report", "out", "--compare", "0", code=0)
    page = (zimage.folder / "out/report.html").read_text()
    found = Tags(page)
    assert {tag for tag, _ in found.tags} <= {
        *("html", "head", "meta", "title", "link", "style", "body", "main", "h1", "h2", "p"),
        *("pre", "div", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
        *("img", "br"),
    }
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    policy = next(a["content"] for t, a in found.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    for text in HOSTILE:
        assert visible_line(text) in found.cells
    zimage("report", "out", "-o", "r.md", "--compare", "0", code=0)
    text = (zimage.folder / "r.md").read_text()
    slowest = table_rows(text, "Slowest images")
    for index, prompt in prompts.items():
        assert len(slowest[str(index)]) == 6
        assert slowest[str(index)][-1] == visible_line(prompt)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
@example("a\\|b")
@example("\\")
@example("http://a.b www.c.d")
def test_any_cell_is_one_cell(text: str) -> None:
    page = markdown_page("t", [Table(("a", "b"), [(text, "x")]), Paragraph(text)], "g", "s")
    last = next(line for line in reversed(page.splitlines()) if line.startswith("| "))
    assert len(last.replace("\\\\", "").replace("\\|", "").split("|")) == 4
    shown = markdown_text(text)
    assert unescaped(shown) == visible_line(text)
    assert not re.search(r"(?<!\\)[<`*_\[\]&~$]", shown.replace("\\\\", ""))
    found = Tags(html_page("t", [Table(("a", "b"), [(text, "x")])], "g"))
    assert found.cells == [visible_line(text), "x"]


def test_look_alikes_are_shown_with_their_prompts(zimage: CommandLine) -> None:
    prompts = {0: "a green disc", 64: "a green disc", 1: "a disc", 65: "another disc"}
    make_output("out", 66, prompts=prompts, distinct=64)
    lost = next((zimage.folder / "out").glob("images/*/faces_00000002.png"))
    lost.unlink()
    out = zimage("report", "out", code=0).out
    number = int(re.search(r"alike     (\d+) images? like an earlier one, of 65 of 66", out)[1])
    assert number >= 2 and "1 image not readable" in out
    page = (zimage.folder / "out/report.html").read_text()
    assert "sample 2: images/" in page and "the file is missing" in page
    found = Tags(page).cells
    same, differing = "0: a green disc64: the same", "1: a disc65: another disc"
    assert same in found and differing in found
    assert page.count('src="data:image/webp') == 2 * min(number, 50)
    out = zimage("report", "out", "--compare", "10", code=0).out
    page = (zimage.folder / "out/report.html").read_text()
    assert "of 9 of 66 images compared" in out
    assert "Compared: 9 of 66 images, the first ones; --compare 66 compares all." in page


def test_what_looks_alike() -> None:
    rng = np.random.default_rng(0)
    disc = picture(0)
    noise = rng.integers(-6, 7, disc.shape)
    noisy = np.clip(disc.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    large = disc.repeat(3, axis=0).repeat(3, axis=1)
    other_color = disc[..., [2, 0, 1]]
    moved = np.roll(disc, 20, axis=1)
    images = [disc, noisy, other_color, moved, large, np.full_like(disc, 90), np.full_like(disc, 9)]
    found = look_alikes([look_at(np.ascontiguousarray(image)) for image in images])
    assert {(pair.first, pair.second) for pair in found} == {(0, 1), (0, 4)}
    assert found[0].second == 4 and found[0].bits <= found[1].bits  # the closest first


def test_without_matplotlib(zimage: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    make_output("out", 100)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = zimage("report", "out", "--compare", "0", code=0).out
    words = "matplotlib is not installed: pip install 'zimage-batch[report]'"
    assert f"no plots: {words}\n" in out
    page = (zimage.folder / "out/report.html").read_text()
    assert "Without plots: matplotlib is not installed" in page and "svg+xml" not in page
    assert "Slowest images" in page


def test_object_store(zimage: CommandLine, uri: str) -> None:
    make_output(uri, 10)
    err = zimage("report", uri, code=2).err
    assert f"{uri}: is no local folder; allowed: with -o FILE for the report" in err
    out = zimage("report", uri, "-o", ".", "--format", "md", code=0).out
    assert "faces: 10 of 10 images, 0 failed" in out
    assert "Images were not compared, which would have to be fetched: --compare N" in out
    assert "](report-rate.svg)" in (zimage.folder / "report.md").read_text()
    out = zimage("report", uri, "-o", "page.html", "--compare", "3", code=0).out
    assert "of 3 of 10 images compared" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-o", "r.txt"), "-o: r.txt: allowed: a folder that is there, or a file that ends in"),
        (("-o", "gone/r.md"), "-o: gone/r.md: no such folder: gone"),
        (("-o", "mine.md"), "mine.md: is there and no report of this command; allowed: -o FILE"),
        (("-o", "link.md"), "link.md: is a link, a folder or a device; allowed: a file"),
        (("-o", "r.md", "--format", "html"), "--format: html: allowed: md, as -o r.md ends"),
        (("-o", "s3://b/r.md"), "allowed: a local file or folder"),
    ],
)
def test_places_where_no_report_can_go(
    zimage: CommandLine, flags: tuple[str, ...], words: str
) -> None:
    make_output("out", 3)
    zimage.write("mine.md", "# mine")
    (zimage.folder / "link.md").symlink_to("mine.md")
    assert words in zimage("report", "out", *flags, code=2).err
    assert (zimage.folder / "mine.md").read_text() == "# mine"


def test_no_output(zimage: CommandLine) -> None:
    assert "nowhere: no such folder" in zimage("report", "nowhere", code=2).err


def event(epoch: int, name: str, second: int, **facts: object) -> dict[str, object]:
    return {"epoch": epoch, "event": name, "time": f"2026-11-30T09:00:{second:02d}+00:00", **facts}


def test_runs_from_events() -> None:
    gpu = {"node": "n", "device": "H100", "pid": 1, "seconds": 4.0}
    runs = read_runs(
        [
            event(1, "epoch", 0),
            event(1, "worker_ready", 5, worker="w0", **gpu),
            event(1, "worker_ready", 10, worker="w1", **gpu),
            event(1, "worker_died", 20, worker="w0"),
            event(1, "end", 30),
            event(2, "epoch", 40),  # no worker ever came
            event(2, "end", 41),
            event(3, "worker_ready", 50, worker="w0", node="n", device="cpu", seconds=1.0),
            event(3, "commit", 59),
        ]
    )
    assert (runs.number, runs.active_seconds, runs.lost) == (2, 25 + 9, 1)
    assert runs.worker_seconds == {"H100": 15 + 20, "cpu": 9}
    assert list(runs.loading_seconds) == [4.0, 4.0, 1.0]


def test_images_a_gpu_hour(tmp_path: Path) -> None:
    make_output(str(tmp_path / "out"), 40)
    facts = read_facts(Output.open(str(tmp_path / "out")))
    assert len(facts.created) == 40 and facts.created[0] == BEGUN.timestamp()
    facts.makers = {("w0", "n", "H100"): Maker(40, 20.0)}
    facts.runs = Runs(1, 60.0, {"H100": 120.0}, [3.0], 0)
    table = next(block for block in times(facts, 0.5, []) if isinstance(block, Table))
    found = dict(table.rows)
    assert found["images a GPU-hour, H100"] == "2,400"  # 40 in 120 s of workers, half a GPU each
    assert found["images a second meanwhile"] == "0.667"


def test_rates() -> None:
    edges, values = rates(np.array([100.0, 101.0, 102.0, 110.0]), bins=5)
    assert list(edges) == [0, 2, 4, 6, 8, 10]
    assert list(values) == [1.0, 0.5, 0, 0, 0.5]


def test_record_and_events_of_somebody_else(zimage: CommandLine) -> None:
    make_output("out", 12)
    out = zimage.folder / "out"
    hostile.change_record(out, lambda data: [data["job"].pop(k) for k in ("run", "sampling")])
    facts = {"worker": "<b>", "node": "|", "device": "H100 </td>", "pid": 1}
    lines = [
        event(1, "epoch", 0, host="h/b/n", pid=1, started=1.0, nonce="x"),
        *(
            event(1, "worker_ready", 1, **facts, seconds=seconds)
            for seconds in (10**400, math.nan, "long", -1.0, 2.5)
        ),
        event(1, "end", 2),
    ]
    zimage.write(
        "out/events/000001-00000.jsonl", "".join(json.dumps(line) + "\n" for line in lines)
    )
    zimage("report", "out", "--compare", "0", code=0)
    cells = Tags((out / "report.html").read_text()).cells
    assert cells[cells.index("loading of a worker, median and most") + 1] == "2.5 s, 2.5 s"
    assert cells[cells.index("sampling") + 1] == "1024 x 1024, 8 steps, guidance 0"


def test_damaged_manifest_is_an_error(zimage: CommandLine) -> None:
    make_output("out", 3)
    part = next((zimage.folder / "out/manifest").iterdir())
    part.write_bytes(b"no parquet")
    assert "damaged manifest part" in zimage("report", "out", code=5).err
    assert not (zimage.folder / "out/report.html").exists()
