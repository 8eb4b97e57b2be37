"""Build the placeholder, unless the real package is installed: it must not take its place."""

import sysconfig
from pathlib import Path

NAME = Path(__file__).resolve().parent.name
if any((Path(sysconfig.get_path(kind)) / NAME / "__init__.py").exists() for kind in ("purelib", "platlib")):
    raise SystemExit(f"a real {NAME} is installed here, which its placeholder must not replace: leave out ./stubs/{NAME}")

from setuptools import setup

setup()
