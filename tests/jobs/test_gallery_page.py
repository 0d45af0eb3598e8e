"""The gallery page in a real browser, Chromium without a window."""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gallery_output import SHARD, commit, make_output
from job_runs import wait_for

from jobs.cli import main
from jobs.gallery_server import GalleryServer
from jobs.rejected import parse_rejected, read_rejected

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,900",
)
COUNT = 5000
PROMPTS = {
    0: "plain words",
    1: "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    2: "javascript:alert(3) \u202egnp.exe\u202c \x1b[31mred\x07 \u2028 end",
    3: 'it\'s "quoted" $(touch /tmp/never) `id` \\ !! \n a second line ä 雪',
    4: "--model=/etc {{data}} <b onmouseover=alert(4)>bold</b>",
}
METADATA = {1: {"<img src=x onerror=alert(5)>": "<svg onload=alert(6)>", "hair": "<i>red</i>"}}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no browser: apt-get install chromium chromium-driver",
    ),
]


class Page:
    """A page in the browser, and what a user does with it."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        driver.get(address)
        self.wait("document.querySelectorAll('.tile').length > 0")

    def js(self, expression: str) -> Any:
        return self.driver.execute_script(f"return {expression}")

    def wait(self, expression: str) -> Any:
        return wait_for(lambda: self.js(expression), 30)

    def keys(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def count(self, words: str) -> None:
        self.wait(f"document.getElementById('count').textContent === {json.dumps(words)}")

    def check(self, column: str, value: str) -> None:
        """Click the box beside a value."""
        self.driver.execute_script(
            "const lines = [...filters.get(arguments[0]).values.values()];"
            "lines.find((l) => l.querySelector('bdi').textContent === arguments[1]).click()",
            column,
            value,
        )

    def open(self, index: int) -> None:
        self.driver.execute_script("choose(arguments[0]); openPanel()", index)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    with webdriver.Chrome(options=options, service=service) as found:
        yield found


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a page from the disk, of 5000 samples, some of them hostile."""
    folder = tmp_path_factory.mktemp("gallery") / "an output's"
    make_output(str(folder), COUNT, prompts=PROMPTS, metadata=METADATA)
    assert main(["gallery", str(folder)]) == 0
    return (folder / "gallery.html").as_uri()


@pytest.fixture
def page(driver: Any, address: str) -> Iterator[Page]:
    found = Page(driver, address)
    yield found
    # none of the tests makes the page complain, or run what a table says
    problems = [line["message"] for line in driver.get_log("browser")]
    driver.execute_script("unsaved = false")
    assert problems == []


def test_thousands_of_images_open_at_once_and_scroll_to_the_end(driver: Any, address: str) -> None:
    driver.get("about:blank")
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    page = Page(driver, address)
    page.wait(
        "[...document.querySelectorAll('.tile img')].filter((i) => i.naturalWidth).length > 8"
    )
    found = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    metrics = {metric["name"]: metric["value"] for metric in found}
    assert metrics["TaskDuration"] < 2  # seconds of the page's thread, however busy the machine is
    page.count("5,000 samples")
    assert page.js("document.querySelectorAll('.tile').length") < 100
    page.js("grid.scroll.scrollTo(0, 1e9)")
    page.wait("document.getElementById('tile-4999') !== null")
    assert page.js("document.querySelectorAll('.tile').length") < 100
    box = page.js("document.getElementById('tile-4999').getBoundingClientRect().toJSON()")
    assert box["top"] > 0 and box["bottom"] <= 900
    page.wait("document.querySelector('#tile-4999 img').naturalWidth === 64")


def test_filters(page: Page) -> None:
    rows = page.js("rows.map((r) => [r.index, r.status, r.prompt, r.profile_age, r.profile_hair])")

    def number(fits: Callable[..., bool]) -> str:
        return f"{sum(fits(*row) for row in rows):,} of 5,000"

    page.keys("/")
    page.keys("HARBOUR", " ", "red hair")
    page.count(number(lambda i, s, p, *_: "harbour" in p and "red" in p and "hair" in p))
    assert 0 < page.js("shownRows.length") < 200
    page.keys("\ue00c")  # Escape leaves the field
    page.js("document.getElementById('clear').click()")
    page.count("5,000 samples")
    page.check("status", "failed")
    page.count(number(lambda i, s, *_: s == "failed"))
    page.wait("[...document.querySelectorAll('.tile')].every((t) => t.matches('.failed'))")
    assert page.text(".tile .cause") == "invalid_image"
    page.check("status", "failed")
    page.check("profile_hair", "red")
    page.check("profile_hair", "blue")
    page.count(number(lambda *row: row[4] in ("red", "blue")))
    for column, text, fits in (
        ("profile_age", "20-30, 77", lambda *row: 20 <= row[3] <= 30 or row[3] == 77),
        ("seed", "42-141", lambda i, *_: i < 100),
    ):
        page.driver.execute_script(
            "const field = filters.get(arguments[0]).input; field.value = arguments[1];"
            "field.dispatchEvent(new Event('input'))",
            column,
            text,
        )
        rows = [row for row in rows if row[4] in ("red", "blue") and fits(*row)]
        page.count(f"{len(rows):,} of 5,000")
    assert rows
    page.driver.execute_script(
        "const field = filters.get('seed').input; field.value = 'x';"
        "field.dispatchEvent(new Event('input'))"
    )
    page.wait("filters.get('seed').input.getAttribute('aria-invalid') === 'true'")
    page.js("document.getElementById('clear').click()")
    page.count("5,000 samples")
    assert page.js("[...document.querySelectorAll('input:checked')].length") == 0


def test_keys(page: Page) -> None:
    down, right, enter, escape, end = "\ue015", "\ue014", "\ue007", "\ue00c", "\ue010"
    columns = page.js("grid.columns")
    assert columns > 2 and page.js("grid.chosen") == 0
    page.keys(right, right, down)
    assert page.js("grid.chosen") == columns + 2
    chosen = page.js("document.querySelector('.tile[aria-selected=true]').id")
    assert page.js("grid.scroll.getAttribute('aria-activedescendant')") == chosen
    page.keys(enter)
    assert page.text("#panel h2") == f"Sample {columns + 2}"
    page.keys(right)
    assert page.text("#panel h2") == f"Sample {columns + 3}"
    page.keys(escape)
    assert page.js("panel.hidden")
    page.keys(end)
    assert page.js("grid.chosen") == 4999
    page.wait("document.getElementById('tile-4999') !== null")
    page.keys("?")
    assert page.js("document.getElementById('help').open")
    page.keys(escape)
    assert not page.js("document.getElementById('help').open")
    page.keys("/", "?x")
    assert page.js("document.getElementById('words').value") == "?x"
    assert page.js("marks.size") == 0


def test_the_panel_and_its_commands(page: Page, tmp_path: Path) -> None:
    for index in PROMPTS:
        page.open(index)
        shown = page.text("#panel")
        assert "Seed" in shown and str(42 + index) in shown
        lines = page.js("[...document.querySelectorAll('#panel pre')].map((p) => p.textContent)")
        program = tmp_path / "zimage"
        program.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
        program.chmod(0o755)
        words = [
            subprocess.run(
                ["bash", "-c", line], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True
            ).stdout.decode()
            for line in lines
        ]
        regen, generate = (text.split("\0")[:-1] for text in words)
        assert regen[0] == "regen" and regen[2:] == [str(index)] and "an output's" in regen[1]
        flags = dict(zip(generate[3::2], generate[4::2], strict=False))
        prompt = flags.get("--prompt")
        if PROMPTS[index].startswith("-"):
            assert f"--prompt={PROMPTS[index]}" in generate
        else:
            assert prompt == PROMPTS[index]
            assert (flags["--seed"], flags["--steps"]) == (str(42 + index), "8")
            assert flags["-o"] == f"faces_{index:08d}.png"
    page.wait("document.querySelector('.picture img').src.endsWith('faces_00000004.png')")
    page.open(96)
    assert "invalid_image" in page.text("#panel .cause-box")
    assert page.text("#panel pre").endswith("--retry-failed")


def test_text_of_tables_never_becomes_markup(page: Page) -> None:
    hostile = "script:not(:last-of-type):not([type]), [onerror], [onload], [onmouseover], svg, b, i"
    for index in PROMPTS:
        page.open(index)
        assert page.js(f"document.body.querySelectorAll({json.dumps(hostile)}).length") == 0
        assert page.js("document.querySelectorAll('img[src=x], a[href^=javascript]').length") == 0
    page.open(1)
    assert PROMPTS[1] in page.text("#panel") and "<svg onload=alert(6)>" in page.text("#panel")
    assert "<i>red</i>" in page.js("document.getElementById('groups').textContent")
    page.open(2)
    shown = page.text("#panel .prose")
    assert "\\u{202e}gnp.exe\\u{202c}" in shown and "\\u{001b}[31mred\\u{0007}" in shown
    assert page.js("document.scripts.length") == 3
    assert page.js("getComputedStyle(document.querySelector('#panel .prose')).unicodeBidi") == (
        "isolate"
    )
    # and markup that came in all the same would do nothing
    page.driver.execute_script(
        "const script = document.createElement('script'); script.textContent = 'ran = 1';"
        "const box = document.createElement('div');"
        "box.innerHTML = '<img src=data:, onerror=\"ran = 2\">'; document.body.append(script, box);"
        "box.firstChild.addEventListener('error', () => setTimeout(() => { tried = true }))"
    )
    page.wait("typeof tried !== 'undefined'")
    assert page.js("typeof ran") == "undefined"
    refused = [line["message"] for line in page.driver.get_log("browser")]
    assert len(refused) >= 2 and all("Content Security Policy" in line for line in refused)


def test_marks_of_a_page_from_the_disk_are_downloaded(page: Page) -> None:
    page.keys("\ue014", "\ue014", "x")
    page.open(5)
    page.driver.execute_script("document.getElementById('note').value = '=six \"fingers\", too'")
    page.js("document.getElementById('reject').click()")
    assert page.text("#save-marks") == "Download rejected.csv (2)"
    assert page.js("document.querySelectorAll('.tile.rejected').length") == 2
    lines = page.js("[...document.querySelectorAll('#panel pre')].map(pre => pre.textContent)")
    assert lines[0].endswith("--import-rejected rejected.csv")
    assert lines[1].endswith("--redo-rejected")
    marks = parse_rejected(page.js("marksAsCsv()").encode(), "page")
    hashes = page.js("[rowOf.get(2).pixels_sha256, rowOf.get(5).pixels_sha256]")
    assert [mark.image for mark in marks] == [(2, hashes[0]), (5, hashes[1])]
    assert [mark.note for mark in marks] == ["", '\'=six "fingers", too']
    page.check("status", "rejected")
    page.count("2 of 5,000")
    page.keys("x")


def test_a_served_page_follows_the_job_and_saves_marks(driver: Any, tmp_path: Path) -> None:
    storage = make_output(str(tmp_path / "out"), SHARD + 50, made=SHARD)
    with GalleryServer(storage.uri, tmp_path / "thumbnails", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            page = Page(driver, server.address)
            page.count("100 samples")
            page.wait("document.querySelector('#tile-1 img').naturalWidth === 64")
            page.keys("\ue014", "x")
            (mark,) = wait_for(lambda: read_rejected(storage))
            assert mark.index == 1
            page.wait("document.querySelector('#tile-1.rejected') !== null")
            page.open(1)
            assert page.text("#panel pre").endswith("--redo-rejected")
            page.open(7)
            page.wait("document.querySelector('.picture img').src.includes('/image/7?')")
            commit(storage, SHARD, SHARD + 50)
            page.count("150 samples")
            assert page.text("#panel h2") == "Sample 7"
            commit(storage, 1, 2, revision=1)  # made again: the mark no longer counts
            page.wait("document.querySelector('#tile-1.tile:not(.rejected)') !== null")
            assert [line["message"] for line in driver.get_log("browser")] == []
            driver.execute_script("fetch = () => Promise.reject(new TypeError('gone'))")
            page.wait("!document.getElementById('problem').hidden")
            assert "zimage gallery --serve has ended" in page.text("#problem")
        finally:
            server.shutdown()
            thread.join()


def test_an_embedded_page_needs_nothing_beside_it(driver: Any, tmp_path: Path) -> None:
    make_output(str(tmp_path / "out"), 100)
    assert main(["gallery", str(tmp_path / "out"), "--embed", "-o", str(tmp_path / "a.html")]) == 0
    shutil.rmtree(tmp_path / "out")
    page = Page(driver, (tmp_path / "a.html").as_uri())
    page.wait("[...document.querySelectorAll('.tile img')].every((i) => i.naturalWidth === 64)")
    page.open(3)
    page.wait("document.querySelector('.picture img').naturalWidth === 64")
    assert [line["message"] for line in driver.get_log("browser")] == []


def test_light_and_dark(driver: Any, address: str) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        page = Page(driver, address)
        grounds.append(page.js("getComputedStyle(document.body).backgroundColor"))
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert grounds == ["rgb(245, 246, 248)", "rgb(17, 19, 24)"]
