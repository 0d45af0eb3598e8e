"""Plots of a report, drawn by matplotlib, which is an optional package."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from jobs.page import Plot
from jobs.quantities import counted
from jobs.report_facts import Facts, Floats, rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "matplotlib is not installed: pip install 'zimage-batch[report]'"
LEAST = 10
"""Images below which a plot says no more than the numbers."""
_STRETCHES = 60  # of the axis, at most
_WIDTH, _HEIGHT = 9.0, 2.6  # inches
_COLOR, _BAD, _GRID = "#2f55d4", "#b3261e", "#dfe2e8"
_SHOWN = 99.5  # percent of the images in the histogram


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw_plots(facts: Facts) -> list[Plot]:
    """The plots that say more than the numbers do, in the order of a report."""
    plots = []
    if len(facts.created) >= LEAST and facts.created[-1] > facts.created[0]:
        plots.append(_rate(facts.created))
    if len(facts.seconds) >= LEAST:
        plots.append(_seconds(facts.seconds))
    if len(facts.failed_by_type) > 1:
        plots.append(_failures(facts.failed_by_type))
    return plots


def _rate(created: Floats) -> Plot:
    edges, values = rates(created, _bins(created))
    unit, scale = _unit(float(edges[-1]))
    with _figure("rate") as (figure, axes):
        axes.stairs(values, edges / scale, fill=True, color=_COLOR, alpha=0.85)
        axes.set_xlim(0, float(edges[-1]) / scale)
        axes.set_ylim(0, None)
        axes.set_xlabel(f"{unit} since the first image")
        axes.set_ylabel("images a second")
        words = f"Images a second in stretches of {edges[1] - edges[0]:.3g} s"
        return Plot("rate", words, _svg(figure, "rate"))


def _seconds(seconds: Floats) -> Plot:
    most = float(np.percentile(seconds, _SHOWN))
    shown = seconds[seconds <= most]
    median = float(np.median(seconds))
    with _figure("seconds") as (figure, axes):
        axes.hist(
            shown, bins=min(_STRETCHES, max(LEAST, len(shown) // 5)), color=_COLOR, alpha=0.85
        )
        axes.axvline(median, color="#1a1d23", linewidth=1, linestyle="--")
        axes.set_xlim(0, None)
        axes.set_xlabel("seconds for an image")
        axes.set_ylabel("images")
        more = len(seconds) - len(shown)
        cut = f"; {counted(more, 'slower image')} not shown" if more else ""
        words = f"Seconds for an image; the line is the median, {median:.3g} s{cut}"
        return Plot("seconds", words, _svg(figure, "seconds"))


def _failures(failed: Mapping[str, int]) -> Plot:
    from matplotlib.ticker import MaxNLocator

    order = sorted(failed, key=lambda kind: (failed[kind], kind))
    with _figure("failures", height=0.7 + 0.3 * len(order)) as (figure, axes):
        bars = axes.barh(order, [failed[kind] for kind in order], color=_BAD, alpha=0.85)
        axes.bar_label(bars, padding=4)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("failed samples")
        return Plot("failures", "Failed samples by error_type", _svg(figure, "failures"))


@contextmanager
def _figure(name: str, height: float = _HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    """A figure with our looks; the same bytes for the same numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    looks = {
        "svg.hashsalt": name,
        "font.size": 9.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#98a0b0",
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": _GRID,
        "text.parse_math": False,
    }
    with mpl.rc_context(looks):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Figure, name: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": name})
    return buffer.getvalue()


def _bins(values: Floats) -> int:
    """So many that most hold a few images."""
    return min(_STRETCHES, max(LEAST, len(values) // 5))


def _unit(seconds: float) -> tuple[str, float]:
    if seconds >= 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if seconds >= 300 else ("seconds", 1.0)
