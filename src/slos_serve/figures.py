"""How our figures look: legible in print, in the dark and by the colour-blind; written as PNG or SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slos_serve.errors import MissingExtraError

OURS, STOCK, ACCENT, GREY = "#1f77d0", "#e0702a", "#2a9d6a", "#8a8f98"
INK = "#7b8190"  # axes and text: grey that is legible on white and on near-black


def pyplot_module() -> Any:
    """Return pyplot, drawing to files. `MissingExtraError` where matplotlib is not installed."""
    try:
        import matplotlib as mpl  # noqa: PLC0415

        mpl.use("Agg", force=True)
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ModuleNotFoundError:
        raise MissingExtraError(module="matplotlib", extra="bench") from None
    return plt


@contextmanager
def style() -> Iterator[Any]:
    """Yield pyplot in our style."""
    pyplot = pyplot_module()
    settings = {
        "font.size": 10,
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "grid.color": INK,
        "grid.alpha": 0.25,
        "axes.grid": True,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "slos-serve",
    }
    with pyplot.rc_context(settings):
        yield pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG on white and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white", bbox_inches="tight", metadata={"Software": None})
    pyplot_module().close(figure)


def svg(figure: Any) -> str:
    """Return a figure as SVG for a page of any colour, and leave it open."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 width="100%"', text, count=1)
