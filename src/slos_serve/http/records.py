"""What is remembered of recent requests: bounded, found by any of their ids, and no tenant's crowd out another's."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from slos_serve.config import short
from slos_serve.core.story import TROUBLE, state_of

Record = dict[str, Any]

_CHOICE, _PART, _GIVEN = re.compile(r"^\d+_"), re.compile(r"_\d+$"), re.compile(r"^(chat)?cmpl-")


class Records:
    """Records by our id. Where there are too many, the tenant that has most gives up its oldest."""

    def __init__(self, max_records: int) -> None:
        self.num_changes = 0
        self._max_records = max_records
        self._by_id: dict[str, Record] = {}
        self._by_tenant: dict[str, OrderedDict[str, None]] = {}
        self._aliases: dict[tuple[str, str], str] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Any:
        return iter(self._by_id)

    def get(self, slo_id: str) -> Record | None:
        """Return a record by our id."""
        return self._by_id.get(slo_id)

    def make(self, slo_id: str, slo_class: str, tenant: str) -> Record:
        """Return the record of a request, a new one if there is none."""
        record = self._by_id.get(slo_id)
        if record is None:
            record = {"id": slo_id, "class": slo_class, "tenant": tenant, "verdict": "pending", "reason": ""}
            record |= {"_parts": {}, "_ended": {}, "_aliases": [], "_owner": tenant, "_change": 0}
            self._by_id[slo_id] = record
            self._by_tenant.setdefault(tenant, OrderedDict())[slo_id] = None
            if len(self._by_id) > self._max_records:
                self._forget_one()
        return record

    def find(self, name: str, may_see: Callable[[str], bool] = lambda _: True) -> Record | None:
        """Return a record by our id, the engine's or the client's, of the tenants that the asker may see."""
        record = self._by_id.get(name)
        if record is not None:
            return record if may_see(record["_owner"]) else None
        name = short(name)
        for tenant in filter(may_see, self._by_tenant):
            if (slo_id := self._aliases.get((tenant, name))) is not None:
                return self._by_id[slo_id]
        return None

    def touch(self, record: Record) -> None:
        """Note that a record has changed."""
        self.num_changes += 1
        record["_change"] = self.num_changes

    def recent(self, may_see: Callable[[str], bool], limit: int, *, since: int = 0) -> list[Record]:
        """Return the newest records that the asker may see and that changed after `since`, the newest first.

        Beyond the newest `limit` come as many older ones whose promise was broken or that were declined.
        """
        newest = reversed(self._by_id.values())
        seen = (one for one in newest if one["_change"] > since and may_see(one["_owner"]))
        found = list(itertools.islice(seen, limit))
        return [*found, *itertools.islice((one for one in seen if state_of(one) in TROUBLE), limit)]

    def name(self, slo_id: str, name: str) -> None:
        """Let a record be found by one more name among its tenant's; the newest request of that name counts."""
        record, name = self._by_id[slo_id], short(name)
        if name and name != slo_id and len(record["_aliases"]) < 16:
            self._aliases[record["_owner"], name] = slo_id
            record["_aliases"].append(name)

    def name_by_engine(self, slo_id: str, request_id: object) -> None:
        """Let a request be found by the engine's id and by the one in the client's response.

        vLLM's engine appends `-<8 hex digits>` to the response's id, before that completions `-<prompt number>`, and
        responses and batches `_<part number>`; each of several choices gets `<number>_` in front. In the response's id
        the client's own follows a prefix: by it servers find a request, too, that came through another one.
        """
        record = self._by_id[slo_id]
        if not isinstance(request_id, str) or request_id in record["_aliases"]:
            return
        record.setdefault("request_id", short(request_id))
        stem = _CHOICE.sub("", request_id).rpartition("-")[0]
        prompt_stem, _, number = stem.rpartition("-")
        whole = prompt_stem if number.isdigit() and stem.startswith("cmpl-") else _PART.sub("", stem)
        given = _GIVEN.sub("", whole)
        for name in (request_id, stem, whole, given):
            if name not in record["_aliases"]:
                self.name(slo_id, name)

    def _forget_one(self) -> None:
        tenant = max(self._by_tenant, key=lambda name: len(self._by_tenant[name]))
        slo_id, _ = self._by_tenant[tenant].popitem(last=False)
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        for alias in self._by_id.pop(slo_id)["_aliases"]:
            if self._aliases.get((tenant, alias)) == slo_id:
                del self._aliases[tenant, alias]
