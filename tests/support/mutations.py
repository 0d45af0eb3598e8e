"""Good inputs changed at random, for tests by property: the same changes in every run."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# How many inputs are tried: in every run, and where there is time.
EXAMPLES = pytest.mark.parametrize("examples", [40, pytest.param(2000, marks=pytest.mark.slow)])

_EDGES = (0, 1, 7, 8, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_TOKENS = (b"\0", b"\xff", b'"', b"{", b"}", b"[", b",", b"\n", b"..", b"/", b"<", b"&", b"=", b"-")
JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**63, 2**64, 10**30]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["../x", "/etc/passwd", "", "\0", "\x1b[2J", "a" * 2000]),
    st.just([]),
    st.just({}),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def tried(examples: int) -> Callable[[Any], Any]:
    """Settings of a property: no deadline, as machines are busy; the same inputs in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with up to four edits: bytes set, put in, taken out, repeated; numbers at edges."""
    edited = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(edited) - 1, 0)))
        length = draw(st.integers(1, 40))
        match draw(st.sampled_from(["byte", "token", "number", "cut", "repeat", "end", "swap"])):
            case "byte":
                edited[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case "token":
                edited[place:place] = draw(st.sampled_from(_TOKENS)) * draw(st.integers(1, 3))
            case "number":
                width = draw(st.sampled_from([4, 8]))
                number = draw(st.sampled_from(_EDGES)) % 2 ** (8 * width)
                edited[place : place + width] = number.to_bytes(width, "little")
            case "cut":
                del edited[place : place + length]
            case "repeat":
                edited[place:place] = edited[place : place + length]
            case "end":
                del edited[place:]
            case "swap":
                other = draw(st.integers(0, max(len(edited) - 1, 0)))
                edited[place : place + 4], edited[other : other + 4] = (
                    edited[other : other + 4],
                    edited[place : place + 4],
                )
    return bytes(edited)


@st.composite
def mutated_tree(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of JSON with up to three values replaced, taken out, doubled or put elsewhere."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(1, 3))):
        holders = list(_holders(root))
        holder, key = draw(st.sampled_from(holders))
        match draw(st.sampled_from(["replace", "remove", "add", "wrap", "swap"])):
            case "replace":
                holder[key] = draw(JUNK)
            case "remove":
                if holder is not root:
                    del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(st.text(max_size=8))] = draw(JUNK)
            case "add":
                holder.append(draw(JUNK))
            case "wrap":
                holder[key] = [holder[key]]
            case "swap":
                other, name = draw(st.sampled_from(holders))
                holder[key] = copy.deepcopy(other[name])
    return root[0]


def _holders(value: Any) -> Any:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _holders(value[key])
