"""Bring what pages link to outside `docs/` into the documentation site.

MkDocs reads `docs/` alone. SECURITY.md, CHANGELOG.md and CONTRIBUTING.md belong where GitHub looks for them, examples
where people run them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
HOMES = PAGES | {f"examples/{path.name}": f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
ESCAPED = re.compile(r"`[^`\n]*`")  # GitHub's tables want \| inside code, MkDocs' show it
WORKER = "https://unpkg.com/iframe-worker/shim"  # what the theme would fetch so that files can be searched
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add them, their links to `docs/` rewritten."""
    for name, page in HOMES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at them to where they are in the site."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, match[1]))
        if target not in HOMES:
            return match[0]
        return f"]({posixpath.relpath(HOMES[target], here or '.')}{match[2] or ''})"

    return ESCAPED.sub(lambda code: code[0].replace("\\|", "|"), LINK.sub(moved, markdown))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Have a page load nothing from another host."""
    return output.replace(WORKER, posixpath.relpath("assets/iframe-worker.js", posixpath.dirname(page.url) or "."))


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """Do the same for pages that are no document, such as the one for what is not found."""
    return output.replace(WORKER, "assets/iframe-worker.js")
