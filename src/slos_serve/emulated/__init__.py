"""An emulated device under a real vLLM: steps take as long as a hardware file says and yield made-up tokens.

vLLM looks here in every process of everybody who has this package installed, so nothing is imported: the device is
`emulation`'s affair, and only where `SLOS_SERVE_EMULATE` names one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "SLOS_SERVE_EMULATE"
ENTRY_POINT = "slos_serve.emulated:platform_class"  # as pyproject.toml has it
PLATFORM = "slos_serve.emulated.platform.EmulatedPlatform"


def asked_for(environ: Mapping[str, str] = os.environ) -> str:
    """Return which device the environment asks to emulate, "" where none."""
    return environ.get(VARIABLE, "")


def platform_class() -> str | None:
    """Tell vLLM's search for platforms whether this one is wanted; the entry point of `vllm.platform_plugins`."""
    return PLATFORM if asked_for() else None
