"""The live page at `/slo`: one file of HTML that holds no data, and asks the pages below `/v1/slo/` and `/metrics`.

So it is the guards of those pages that decide what it can show, with the key that is typed into it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from importlib.resources import files

from starlette.responses import HTMLResponse, Response

from slos_serve.core.words import MEANINGS, Outcome, Reason, Said

LIVE = "/slo"
WORDS = {"verdict": MEANINGS[Said], "reason": MEANINGS[Reason], "outcome": MEANINGS[Outcome]}


def live() -> Response:
    """Return the page; browsers run its own script alone and connect to its own server alone."""
    return HTMLResponse(document(), headers={"content-security-policy": policy(), "cache-control": "no-cache"})


@cache
def document() -> str:
    """Return the page's text, with the meanings of what is said about requests in it."""
    text = files("slos_serve.http").joinpath("live.html").read_text(encoding="utf-8")
    return text.replace("{words}", json.dumps(WORDS).replace("<", "\\u003c"), 1)


@cache
def policy() -> str:
    """Return the page's content security policy: scripts and styles by their digests."""
    scripts, styles = (
        " ".join(map(_digest, re.findall(pattern, document(), re.DOTALL)))
        for pattern in (r"<script>(.*?)</script>", r"<style>(.*?)</style>")
    )
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
