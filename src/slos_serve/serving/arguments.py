"""vLLM's arguments as the user gave them: read like vLLM reads them, passed on unchanged.

Flags come as `--name value`, `--name=value` or bare, with `-` or `_` in names; a `--config` file adds flags
that the command line overrides. Only `--additional-config` is taken apart, because ours must be merged in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slos_serve.errors import ConfigError

SHORT = {"tp": "tensor-parallel-size", "pp": "pipeline-parallel-size", "ep": "enable-expert-parallel"}
SHORT |= {"dcp": "decode-context-parallel-size", "pcp": "prefill-context-parallel-size"}
SHORT |= {"dp": "data-parallel-size", "dpl": "data-parallel-size-local", "dpb": "data-parallel-backend"}
SHORT |= {"dpn": "data-parallel-rank", "dpr": "data-parallel-start-rank", "dph": "data-parallel-hybrid-lb"}
SHORT |= {"dpe": "data-parallel-external-lb", "dpm": "data-parallel-multi-port-external-lb"}
SHORT |= {"dpa": "data-parallel-address", "dpp": "data-parallel-rpc-port", "n": "nnodes", "r": "node-rank"}
SHORT |= {"q": "quantization", "asc": "api-server-count", "sc": "speculative-config", "cc": "compilation-config"}
ADDITIONAL = "additional-config"


def _name(token: str) -> str:
    name = token.lstrip("-").partition("=")[0].replace("_", "-")
    return SHORT.get(name, name)


def _is_flag(token: str) -> bool:
    return token.startswith("-") and len(token) > 1 and not token[1].isdigit()


class EngineArguments:
    """The arguments that go to vLLM. Raises `ConfigError` for a `--config` file that cannot be read."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        path = self.get("config")
        self._from_file = _read_config(Path(path)) if path else {}

    def _flags(self) -> Iterator[tuple[int, int, str, str]]:
        """Yield (start, end, name, value) of each flag; tokens start..end-1 are it and its first value."""
        tokens = self.arguments
        for i, token in enumerate(tokens):
            if not _is_flag(token):
                continue
            inline = "=" in token
            has_value = not inline and i + 1 < len(tokens) and not _is_flag(tokens[i + 1])
            value = token.partition("=")[2] if inline else tokens[i + 1] if has_value else ""
            yield i, i + 1 + has_value, _name(token), value

    def get(self, *names: str) -> str | None:
        """Return the last value given to any of the flags, "" for a bare one, None where absent."""
        found = [value for _, _, name, value in self._flags() if name in names]
        if found:
            return found[-1]
        values = [self._from_file[name] for name in names if name in getattr(self, "_from_file", {})]
        return None if not values else values[-1] if isinstance(values[-1], str) else json.dumps(values[-1])

    def has(self, *names: str) -> bool:
        """Tell whether any of the flags is given."""
        return self.get(*names) is not None

    def shaping(self, ignored: frozenset[str]) -> list[str]:
        """Return what bears on the engine's speed, sorted: every flag and file key but `ignored`."""
        given = {name: value for name, value in self._from_file.items() if name not in ignored}
        given |= {name: value for _, _, name, value in self._flags() if name not in ignored}
        return sorted(f"{name}={value}" if value not in ("", None) else name for name, value in given.items())

    def take_additional_config(self) -> dict[str, Any]:
        """Remove every form of `--additional-config` and return them merged.

        Raises `ConfigError` where one is not a JSON object.
        """
        merged: dict[str, Any] = {}
        in_file = self._from_file.get(ADDITIONAL)
        if isinstance(in_file, Mapping):
            merge(merged, in_file)
        drop: set[int] = set()
        for start, end, name, value in self._flags():
            if name == ADDITIONAL:
                merge(merged, _json_object(value))
            elif name.startswith(ADDITIONAL + "."):
                *path, last = self.arguments[start].lstrip("-").partition("=")[0].split(".")[1:]
                part: dict[str, Any] = {last: _json_or_text(value)}
                for key in reversed(path):
                    part = {key: part}
                merge(merged, part)
            else:
                continue
            drop.update(range(start, end))
        self.arguments = [token for i, token in enumerate(self.arguments) if i not in drop]
        return merged


def merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Add `other` to `into`, key by key at every depth; `other` wins."""
    for key, value in other.items():
        below = into.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping):
            merge(below, value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _json_object(value: str) -> dict[str, Any]:
    document = _json_or_text(value)
    if not isinstance(document, dict):
        raise ConfigError(where="arguments", key="--additional-config", value=value, expected="a JSON object")
    return document


def _read_config(path: Path) -> dict[str, Any]:
    import yaml  # noqa: PLC0415

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        reason = f"a readable file ({error.strerror})"
        raise ConfigError(where="arguments", key="--config", value=str(path), expected=reason) from error
    except yaml.YAMLError as error:
        raise ConfigError(where=str(path), key="--config", value="...", expected=f"YAML ({error})") from error
    if not isinstance(document, dict):
        raise ConfigError(where=str(path), key="--config", value=document, expected="a mapping of vLLM's flags")
    return {str(key).replace("_", "-"): value for key, value in document.items()}
