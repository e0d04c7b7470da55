"""Coverage and convergence as SVG: the same bytes for the same history."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsqjob.calibration.coverage import PROJECTIONS, History, expected_growth, unreached_text
from dsqjob.engine.publish import publish_bytes
from dsqjob.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNSEEN = "#e8590c"
_LINE, _FAINT = "#08519c", "#737373"
_SETTINGS = {"svg.hashsalt": "dsqjob", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}


def draw_coverage(history: History, path: Path, token: str, containers: Sequence[str] = ()) -> None:
    """Publish a heat map of the tokens [layers, experts] on a log scale; experts without a token stand out.

    ``containers[l]``, such as ``layers.7.ffn.experts``, numbers the layers; without it they count from 0.
    UsageError ``plot-missing`` without matplotlib.
    """
    with _settings():
        _publish(coverage_figure(history, containers), path, token, "Expert coverage")


def draw_convergence(history: History, path: Path, token: str) -> None:
    """Publish two curves over the tokens: projections whose input amax still grew (log), and experts reached.

    UsageError ``plot-missing`` without matplotlib.
    """
    with _settings():
        _publish(convergence_figure(history), path, token, "Convergence of the input amax")


@contextmanager
def _settings() -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's matplotlibrc says."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "plot-missing", "drawing a calibration needs matplotlib", way_out="pip install 'dsqjob[worker]'"
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def _publish(figure: Figure, path: Path, token: str, title: str) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "dsqjob", "Title": title})
    publish_bytes(path, buffer.getvalue(), token)


def coverage_figure(history: History, containers: Sequence[str] = ()) -> Figure:
    """The heat map, not yet rendered."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    layers, experts = history.tokens.shape
    width, height = min(max(0.036 * experts, 5.5), 14.0), min(max(0.1 * layers, 1.6), 8.0)
    figure = Figure(figsize=(width + 1.6, height + 1.3), layout="constrained")
    axes = figure.add_subplot()
    low, high = _colour_range(history.tokens)
    colours = ListedColormap(colormaps["Blues"](np.linspace(0.12, 1, 256))).with_extremes(bad=_UNSEEN)
    # Cells of several pixels stay sharp in viewers that smooth an enlarged image.
    cells = np.ma.masked_equal(history.tokens, 0).repeat(8, axis=0).repeat(4, axis=1)
    image = axes.imshow(
        cells,
        cmap=colours,
        norm=LogNorm(low, high),
        aspect="auto",
        interpolation="none",
        extent=(-0.5, experts - 0.5, layers - 0.5, -0.5),
    )
    _number_cells(axes, layers, experts, containers)
    axes.set_title(f"Tokens seen by each routed expert\n{unreached_text(history)}; {_tokens_text(history)}", loc="left")
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, aspect=max(8.0, 4.5 * height))
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label("tokens")
    if not history.tokens.all():
        unseen = [Patch(facecolor=_UNSEEN, label="no token")]
        axes.legend(
            handles=unseen, loc="upper right", bbox_to_anchor=(1, 0), borderaxespad=2.2, borderpad=0, frameon=False
        )
    return figure


def convergence_figure(history: History) -> Figure:
    """Both curves, not yet rendered."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    tokens = history.batch_tokens.cumsum()
    grown = history.grown.sum(axis=1, dtype=np.int64)
    reached = history.reached.sum(axis=1, dtype=np.int64)
    marker = "o" if len(tokens) <= 64 else ""
    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)

    upper.plot(tokens, grown, marker=marker, markersize=3, linewidth=1, color=_LINE, label="grew in the batch")
    upper.plot(
        tokens, expected_growth(history), "--", linewidth=1, color=_FAINT, label="by chance, were all batches alike"
    )
    upper.set_yscale("symlog", linthresh=1, linscale=0.5)
    upper.set_ylim(0, 2 * max(1, PROJECTIONS * history.tokens.size))
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    upper.set_ylabel("projections")
    upper.set_title(f"Projections whose input amax grew, of {PROJECTIONS * history.tokens.size:,}", loc="left")
    upper.legend(frameon=False)

    lower.plot(tokens, reached, marker=marker, markersize=3, linewidth=1, color=_LINE, label="had seen a token")
    lower.axhline(history.tokens.size, linestyle=":", color=_FAINT, label=f"all {history.tokens.size:,}")
    lower.legend(loc="lower right", frameon=False)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    lower.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    below = history.tokens.size - int(reached.min(initial=history.tokens.size))
    lower.set_ylim(history.tokens.size - 1.05 * below - 1, history.tokens.size + 0.05 * below + 1)
    lower.set_ylabel("experts")
    lower.set_title(f"Experts reached: {unreached_text(history)}", loc="left")
    lower.set_xlabel(f"tokens ({_tokens_text(history)}, padding included)")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.xaxis.set_major_formatter(EngFormatter(sep=""))
    lower.set_xlim(0, 1.02 * max(1, int(history.batch_tokens.sum())))
    return figure


def _number_cells(axes: Axes, layers: int, experts: int, containers: Sequence[str]) -> None:
    numbers = [_layer_number(name, row) for row, name in enumerate(containers)] or list(range(layers))
    step = _step(layers, (1, 2, 5, 10, 20, 50))
    rows = [row for row, number in enumerate(numbers) if number % step == 0]
    axes.set_yticks(rows, [str(numbers[row]) for row in rows])
    axes.set_xticks(range(0, experts, _step(experts, (1, 2, 4, 8, 16, 32, 64, 128))))
    axes.set_ylabel("layer")
    axes.set_xlabel("expert")


def _layer_number(container: str, row: int) -> int:
    found = re.search(r"\d+", container)
    return int(found[0]) if found else row


def _step(count: int, sizes: Sequence[int]) -> int:
    """Cells from label to label: at most 20 labels, unless there are very many cells."""
    return next((size for size in sizes if count <= 20 * size), sizes[-1])


def _colour_range(tokens: NDArray[np.int64]) -> tuple[float, float]:
    """Ends of the log scale, at least a factor of four apart."""
    seen = tokens[tokens > 0]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (1.0, 1.0)
    low = max(1.0, min(low, high / 4))
    return low, max(high, 4 * low)


def _tokens_text(history: History) -> str:
    return f"{int(history.batch_tokens.sum()):,} tokens in {len(history.batch_tokens):,} batches"
