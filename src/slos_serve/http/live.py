"""The live page at `/slo`: one HTML file that asks `/v1/slo/events`, or holds a run that is over.

Served, it holds no data: the guards of what it asks decide what it can show, with the key that is typed into it. The
same page with a run's document in it (see `records.shown`) is a file that opens anywhere and asks nobody.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.responses import HTMLResponse, Response

LIVE = "/slo"


def live() -> Response:
    """Return the page; browsers run its own script alone and connect to its own server alone."""
    return HTMLResponse(document(), headers={"content-security-policy": served_policy(), "cache-control": "no-cache"})


def holding(run: Mapping[str, Any]) -> str:
    """Return the page as a file that shows a run, and whose script may connect to nobody."""
    text = _filled(json.dumps(run).replace("<", "\\u003c"))
    rule = f'<meta http-equiv="content-security-policy" content="{policy(text)}">'
    return text.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{rule}', 1)


@cache
def document() -> str:
    """Return the page's text as it is served."""
    return _filled("null")


def _filled(data: str) -> str:
    page, script = (
        files("slos_serve.http").joinpath(name).read_text(encoding="utf-8") for name in ("live.html", "live.js")
    )
    before, after = page.split("{data}")
    return before + data + after.replace("{script}", script.strip(), 1)


@cache
def served_policy() -> str:
    """Return the content security policy of the page that is served."""
    return policy(document()) + "; connect-src 'self'; frame-ancestors 'none'"


def policy(text: str) -> str:
    """Return what a page's policy allows: its own script and styles, by their digests."""
    scripts, styles = (
        " ".join(map(_digest, re.findall(pattern, text, re.DOTALL)))
        for pattern in (r"<script>(.*?)</script>", r"<style>(.*?)</style>")
    )
    own = f"script-src {scripts}; style-src {styles}; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
