"""The server that `bench` loads: how it is reached, which model it offers, and what it takes of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from slos_serve.bench.client import BenchRequest, Client, StreamResult, TargetError, list_models
from slos_serve.bench.wire import Wire


@dataclass(slots=True, kw_only=True)
class Target:
    """An OpenAI-compatible server at a URL, with or without `/v1`."""

    url: str
    api_key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    wire: Wire = field(default_factory=Wire)

    async def model(self, name: str | None) -> tuple[str, int | None]:
        """Return the model to ask for, by default the server's first, and its context in tokens if it says.

        A server without a list of models is fine where the model is named.
        """
        try:
            models = await list_models(self.url, api_key=self.api_key, headers=self.headers)
        except TargetError:
            if name is None:
                raise
            return name, None
        known = {str(one.get("id")): one for one in models}
        found = name or next(iter(known))
        length = known.get(found, {}).get("max_model_len")
        return found, int(length) if length else None

    async def offer(
        self,
        model: str,
        requests: Sequence[BenchRequest],
        *,
        endpoint: str,
        slo_form: str,
        on_result: Callable[[StreamResult], None],
    ) -> list[StreamResult]:
        """Send every request at its time and return what came back, in their order."""
        async with Client(
            self.url,
            model,
            endpoint=endpoint,
            slo_form=slo_form,
            api_key=self.api_key,
            headers=self.headers,
            wire=self.wire,
        ) as client:
            return await client.offer(requests, on_result=on_result)
