"""The tokens of one request against their deadlines, as SVG: one picture for the page, the command and records.

Ink is the colour of the text around it, so the picture suits light and dark; lines are told apart by how they are
drawn, not by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from slos_serve.core.slo.deadlines import CHECK_EVERY, due_s
from slos_serve.core.story import milliseconds, points_of
from slos_serve.core.types import Slo

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 236, 46, 16, 14, 52
NUM_CHECKS = 64  # deadlines that are drawn, at most
Points = list[tuple[float, float]]


def picture(record: Mapping[str, Any]) -> str:
    """Return the picture of a record (see `core.story`) as an SVG element; "" where there is nothing to draw."""
    came = [(at, float(count)) for at, count in points_of(record)]
    due = _deadlines(record, int(came[-1][1]) if came else 1)
    if not came and not due:
        return ""
    longest_ms = 1.05 * max(1.0, *(at for at, _ in (*came, *due)))
    most = max(count for _, count in (*came, *due))

    def place(points: Points) -> Points:
        span, room = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return [(LEFT + span * at / longest_ms, HEIGHT - BOTTOM - room * count / most) for at, count in points]

    said = _said(came, due)
    parts = [f"<title>{escape(said)}</title>", *_axes(longest_ms, most)]
    parts += _line(place(_bent(due, came)), "due", 'stroke-dasharray="6 4"') + _line(
        place(came), "came", 'stroke-width="2.5"'
    )
    parts += _crosses(place([point for point in came if _is_late(point, due)]))
    parts += [_text(LEFT, HEIGHT - 21, said), _text(LEFT, HEIGHT - 6, "solid: tokens out; dashed: due; ×: late")]
    return f'<svg class="tokens" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" fill="none">{"".join(parts)}</svg>'


def standalone(svg: str) -> str:
    """Return a picture as a file of its own, dark on white."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" color="#1c2129" style="background:#fff" '
    return svg.replace("<svg ", head, 1) + "\n"


def _deadlines(record: Mapping[str, Any], count: int) -> Points:
    """Return (ms after the arrival, token) for the first token, every tenth and the last one, as far as they are due.

    Tokens are due from when the first one was, or came where it came later: see `core.slo.deadlines`.
    """
    asked = record.get("promise") or record.get("asked") or {}
    times = {key.removesuffix("_ms") + "_s": value / 1e3 for key, value in asked.items() if value}
    slo = Slo(**{key: value for key, value in times.items() if key in Slo.__slots__})
    if slo.ttft_s is None and slo.tpot_s is None:
        return []
    first_s = (record.get("ttft_ms") or 0.0) / 1e3
    thinking = int(record.get("num_thinking_tokens") or 0)
    stride = CHECK_EVERY * max(1, -(-count // (CHECK_EVERY * NUM_CHECKS)))
    tokens = [1, *range(stride, count, stride), *([count] if count > 1 else [])]
    due = [(1e3 * due_s(token, 0.0, first_s, slo, thinking), float(token)) for token in tokens]
    return [(at, token) for at, token in due if at < float("inf")]


def _bent(due: Points, came: Points) -> Points:
    """Return the deadlines as a line that waits where the first token is late: the others are due from then."""
    is_late = len(due) > 1 and came and due[0][1] == came[0][1] and came[0] > due[0]
    return [due[0], came[0], *due[1:]] if is_late else due


def _is_late(point: tuple[float, float], due: Points) -> bool:
    """Tell whether a token came after the deadline of the last checked token up to it."""
    mine = [at for at, token in due if token <= point[1]]
    return bool(mine) and point[0] > mine[-1] + 0.5


def _said(came: Points, due: Points) -> str:
    first = f"first token after {milliseconds(came[0][0])}" if came else "no token came"
    first += f", due after {milliseconds(due[0][0])}" if due and due[0][1] == 1 else ""
    if len(came) < 2:
        return first
    last = f"; token {came[-1][1]:.0f} after {milliseconds(came[-1][0])}"
    return first + last + (f", due after {milliseconds(due[-1][0])}" if len(due) > 1 else "")


def _axes(longest_ms: float, most: float) -> list[str]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    axes = f'<path d="M{LEFT} {TOP}V{floor}H{right}" stroke="currentColor" opacity=".5"/>'
    return [
        axes,
        _text(LEFT - 5, TOP + 8, f"{most:.0f}", "end"),
        _text(LEFT - 5, floor, "0", "end"),
        _text(right, floor + 14, milliseconds(longest_ms), "end"),
        _text(LEFT, floor + 14, "arrival"),
    ]


def _line(points: Points, name: str, how: str) -> list[str]:
    """Return a line, or a ring where it is a single point."""
    if len(points) == 1:
        (x, y) = points[0]
        return [f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="currentColor" {how}/>']
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [f'<polyline class="{name}" points="{path}" stroke="currentColor" {how}/>'] if points else []


def _crosses(points: Points) -> list[str]:
    return [f'<path class="late" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8" stroke="currentColor"/>' for x, y in points]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="currentColor" font-size="11" '
        f'font-family="system-ui, sans-serif">{escape(text)}</text>'
    )
