"""What the documents say is so: commands parse, snippets load, links lead somewhere, the reference is of this code."""

import argparse
import ast
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from slos_serve import cli
from slos_serve.config import SloClass, load_slo_config

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
SAMPLE = ROOT / "docs" / "guide" / "classes.yaml"


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(language):
    """The fenced blocks of a language, each with the name of its page."""
    found = [
        (name, block)
        for page, name in zip(PAGES, NAMES, strict=True)
        for kind, block in FENCE.findall(text_of(page))
        if kind == language
    ]
    return [pytest.param(block, id=f"{name}-{number}") for number, (name, block) in enumerate(found)]


def commands():
    """The words of every `slos-serve VERB ...` in console blocks and code spans, and whether it is complete."""
    found = {}
    for page, name in zip(PAGES, NAMES, strict=True):
        consoles = [block.replace("\\\n", " ") for kind, block in FENCE.findall(text_of(page)) if kind == "console"]
        lines = [(line, True) for block in consoles for line in block.splitlines()]
        lines += [(span.strip("`"), False) for span in re.findall(r"`slos-serve [a-z][^`\n]*`", text_of(page))]
        for line, is_complete in lines:
            words = shlex.split(line, comments=True)
            if "slos-serve" in words:
                words = words[words.index("slos-serve") + 1 :]
                words = words[: next((i for i, word in enumerate(words) if word in {">", "|", "&&"}), len(words))]
                found.setdefault((name, " ".join(words)), (words, is_complete))
    return [pytest.param(*what, id=f"{name}: {line}") for (name, line), what in found.items()]


@cache
def anchors_of(page):
    """The anchors of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"[ -]+", "-", heading) for heading in plain}


def flags_of(parser):
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    deeper = [flags_of(one) for action in subparsers for one in action.choices.values()]
    return set(parser._option_string_actions).union(*deeper)


@pytest.mark.parametrize(("words", "is_complete"), commands())
def test_every_command_in_the_documents_is_taken_by_its_verb(words, is_complete):
    verbs = cli.find_verbs()
    assert words[0] in verbs
    verb = cli.load(verbs[words[0]])
    parser = cli.Parser(prog="slos-serve", allow_abbrev=False)
    verb.configure(parser)
    if getattr(verb, "TAKES_UNKNOWN", False):
        return
    if is_complete:
        parser.parse_args(words[1:])
    else:
        assert not {word for word in words if word.startswith("--")} - flags_of(parser)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_piece_of_yaml_can_be_read_and_classes_are_accepted(block, tmp_path):
    if "--8<--" in block:
        block = SAMPLE.read_text(encoding="utf-8")
    document = yaml.safe_load(block)
    if "classes" in document:
        path = tmp_path / "classes.yaml"
        path.write_text(block, encoding="utf-8")
        load_slo_config(path)


@pytest.mark.parametrize("block", blocks("json"))
def test_every_piece_of_json_can_be_read(block):
    json.loads(block)


@pytest.mark.parametrize("block", blocks("python"))
def test_every_piece_of_python_can_be_compiled_and_what_it_imports_from_here_exists(block):
    tree = ast.parse(block)
    compile(tree, "snippet", "exec")
    ours = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("slos_serve")
    ]
    for node in ours:
        module = __import__(node.module, fromlist=[alias.name for alias in node.names])
        assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_guide_s_python_runs():
    block = next(
        block for kind, block in FENCE.findall(text_of(ROOT / "docs/guide/plan-capacity.md")) if kind == "python"
    )
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=True, timeout=300)
    assert 0 < float(done.stdout) <= 1


def test_the_sample_of_classes_uses_every_key_there_is():
    config = load_slo_config(SAMPLE)
    document = yaml.safe_load(SAMPLE.read_text(encoding="utf-8"))
    used = {key for one in document["classes"].values() if one for key in one}
    known = {field.name for field in dataclasses.fields(SloClass)} - {"name"}
    # A slowdown excludes the absolute number, and ttlt_ms is another word for e2e_ms.
    assert known - used == {"ttlt_ms"}
    assert {field.name for field in dataclasses.fields(config)} == set(document)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_to_a_file_and_a_heading(name):
    page = ROOT / name
    for link in LINK.findall(CODE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if path.name in {"security.md", "changelog.md", "contributing.md"}:  # at the root, in upper case
            path = ROOT / f"{path.stem.upper()}.md"
        assert path.exists(), link
        if anchor and path.suffix == ".md" and "reference" not in path.parts:
            assert anchor in anchors_of(path), link


def test_the_reference_pages_are_of_this_code():
    script = [sys.executable, "scripts/reference.py", "--check"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_page_is_in_the_site_s_contents():
    contents = text_of(ROOT / "mkdocs.yml").partition("\nnav:")[2]
    listed = {line.rpartition(" ")[2] for line in contents.splitlines() if line.endswith(".md")}
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert listed == pages | {"security.md", "changelog.md", "contributing.md"}


@pytest.mark.parametrize(("name", "limit"), [("docs/results.md", 60), ("docs/architecture.md", 60), ("README.md", 60)])
def test_what_should_be_short_is_short(name, limit):
    assert len(text_of(ROOT / name).splitlines()) <= limit


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_that_a_page_names_exists(name):
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    named = re.findall(r"(?:`|^\s{4}|^)make ([a-z-]+)", text_of(ROOT / name), re.MULTILINE)
    assert not [target for target in named if target not in targets]


@pytest.mark.parametrize("name", NAMES)
def test_every_test_that_a_page_names_exists(name):
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text_of(ROOT / name)):
        assert (ROOT / file).exists(), file
        assert not test or re.search(rf"def {test}\(", text_of(ROOT / file)), test


def test_the_site_builds_without_a_warning_and_fetches_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    fetched = re.compile(r'<(?:link|script|img|iframe)[^>]*(?:href|src)="(https?:[^"]*)"')
    for page in (tmp_path / "site").rglob("*.html"):
        links = fetched.findall(page.read_text(encoding="utf-8"))
        assert not [link for link in links if "canonical" not in link], page
