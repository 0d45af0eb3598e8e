"""What is printed of texts that others wrote: nothing acts, nothing is lost, JSON stays JSON."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.terminal import LONGEST_LINE, visible, visible_line

ACTS = {
    "colour": ("\x1b[31mred\x1b[0m", "\\u001b[31mred\\u001b[0m"),
    "title": ("\x1b]0;owned\x07", "\\u001b]0;owned\\u0007"),
    "8-bit CSI": ("\x9b2J", "\\u009b2J"),
    "overwrite": ("1 failed\rall 8 ok", "1 failed\\rall 8 ok"),
    "backspace": ("bad\b\b\bok", "bad\\b\\b\\bok"),
    "delete": ("a\x7fb", "a\\u007fb"),
    "bidi override": ("\u202egnp.exe", "\\u202egnp.exe"),
    "bidi isolate": ("\u2066a\u2069", "\\u2066a\\u2069"),
    "line separator": ("a\u2028b", "a\\u2028b"),
    "soft hyphen": ("pass\u00adword", "pass\\u00adword"),
    "tag characters": ("A\U000e0041", "A\\udb40\\udc41"),
    "lone surrogate": ("\ud83d", "\\ud83d"),
}


@pytest.mark.parametrize("case", ACTS)
def test_what_acts_is_written_out(case: str) -> None:
    text, shown = ACTS[case]
    assert visible(text) == shown


@pytest.mark.parametrize(
    "text",
    ["A cat, 30 years", "名前: 猫", "عربى", "café\nsecond line", "👩\u200d🚀", "می\u200cخواهم", ""],
)
def test_what_people_write_stays(text: str) -> None:
    assert visible(text) == text


@given(st.text())
def test_nothing_that_acts_is_left(text: str) -> None:
    shown = visible(text, longest=None)
    acting = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert not {c for c in shown if unicodedata.category(c) in acting} - set("\n\u200c\u200d")
    assert "\n" not in visible_line(text)
    visible_line(text).encode()  # can be printed in UTF-8


@given(st.text(st.characters(exclude_characters="/:"), max_size=20))
def test_json_stays_the_same_json(text: str) -> None:
    dumped = json.dumps({"prompt": text}, ensure_ascii=False, indent=2)
    assert json.loads(visible(dumped, longest=None)) == {"prompt": text}


def test_long_lines_are_cut_each() -> None:
    shown = visible("a" * 10_000_000 + "\nb")
    assert len(shown) < LONGEST_LINE + 100
    assert shown.endswith("... and 9,996,000 characters more\nb")


def test_one_line_of_a_forger_stays_one() -> None:
    assert visible_line("A cat\nall 8 images as committed") == "A cat\\nall 8 images as committed"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:canary@bucket/x: denied", "s3://***@bucket/x: denied"),
        ("see http://me:canary@head:8265", "see http://***@head:8265"),
        ("https://canary@host/a", "https://***@host/a"),
        ("az://c/p?sv=1&sig=canary&x=1", "az://c/p?sv=1&sig=***&x=1"),
        ("https://b/k?X-Amz-Security-Token=canary", "https://b/k?X-Amz-Security-Token=***"),
        ("s3://bucket/a@b.png", "s3://bucket/a@b.png"),
    ],
)
def test_credentials_in_addresses_are_masked(text: str, shown: str) -> None:
    assert visible(text) == shown
