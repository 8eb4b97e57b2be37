"""A self-contained HTML page: one file, no script needed, in light and dark.

Figures are SVG that takes its ink from the page.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from slos_serve import figures

STYLE = """
:root { color-scheme: light dark; --ink: #1c2129; --soft: #5b6472; --line: #d9dde3; --card: #f6f7f9; --page: #ffffff;
  --ours: #1767b8; --stock: #b8531a; --good: #1c7a4f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #9aa3b0; --line: #333a45; --card: #1b2028;
  --page: #12151a; --ours: #62aef5; --stock: #f0935a; --good: #56c993; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
.lead { font-size: 1.1rem; margin: .2rem 0 1rem; } .soft, footer { color: var(--soft); font-size: .9rem; }
.notice { border: 2px solid var(--stock); border-radius: 10px; padding: .6rem 1rem; }
.figures { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1.2rem 0; }
.figure { background: var(--card); border-radius: 10px; padding: .8rem 1.1rem; flex: 1 1 12rem; }
.figure b { display: block; font-size: 1.6rem; line-height: 1.2; }
.ours { color: var(--ours); } .stock { color: var(--stock); } .good { color: var(--good); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; } th:first-child, td:first-child { text-align: left; }
tr.all td { font-weight: 600; } tr.rate td { text-align: left; padding-top: 1rem; font-weight: 600; }
svg { display: block; height: auto; color: var(--soft); } code { font-size: .9em; }
"""


def percent(value: float | None) -> str:
    """Return a share as a percentage, a dash where there is none."""
    return "–" if value is None else f"{value * 100:.0f} %"


def inline(figure: Any) -> str:
    """Return a figure as SVG whose ink is the page's."""
    return figures.svg(figure).replace(figures.INK, "currentColor")


def facts(items: Mapping[str, object]) -> str:
    """Return names and values as a table."""
    rows = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in items.items())
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """Return a table that scrolls sideways where it must; `rows` are HTML, `<tr>` and all."""
    head = "".join(f"<th>{text(name)}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def page(
    *,
    title: str,
    lead: str,
    tiles: Sequence[tuple[str, str, str]],
    sections: Sequence[tuple[str, str]],
    notice: str = "",
) -> str:
    """Return a whole page. Tiles are (big text, what it is, class); sections are (heading, HTML).

    `notice`: what has to be known before any number on it is read.
    """
    shown = "".join(
        f'<div class="figure"><b class="{style}">{text(big)}</b>{text(what)}</div>' for big, what, style in tiles
    )
    said = f'<p class="notice">{text(notice)}</p>' if notice else ""
    body = "".join(f"<section><h2>{text(heading)}</h2>{content}</section>" for heading, content in sections)
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>{text(title)}</h1>"
        f"{said}"
        f'<p class="lead">{lead}</p><div class="figures">{shown}</div>{body}</main></body></html>\n'
    )


def text(value: object) -> str:
    """Return a value as text that HTML reads as such."""
    return html.escape(str(value))
