"""Stands in for a server in tests of the fault suite: a launcher, and below it an engine that streams made-up tokens.

python fake_server.py PORT
"""

import asyncio
import json
import signal
import subprocess
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

TOKEN_S = 0.02
RUNNING = set()


async def complete(request):
    asked = await request.json()
    key = object()

    async def stream():
        RUNNING.add(key)
        try:
            for i in range(1, asked["max_tokens"] + 1):
                await asyncio.sleep(TOKEN_S)
                reason = "length" if i == asked["max_tokens"] else None
                chunk = {"choices": [{"text": "x", "finish_reason": reason}], "usage": {"completion_tokens": i}}
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            RUNNING.discard(key)

    return StreamingResponse(stream(), media_type="text/event-stream")


async def status(_request):
    return JSONResponse({"snapshot": {"num_running": len(RUNNING), "num_waiting": 0}})


async def health(_request):
    return JSONResponse({})


if __name__ == "__main__":
    if sys.argv[2:] != ["EngineCore"]:  # the launcher: it ends as its engine does
        child = subprocess.Popen([sys.executable, __file__, sys.argv[1], "EngineCore"])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: child.terminate())
        sys.exit(abs(child.wait()))
    routes = [Route("/health", health), Route("/livez", health), Route("/v1/slo/status", status),
              Route("/v1/completions", complete, methods=["POST"])]  # fmt: skip
    uvicorn.run(Starlette(routes=routes), port=int(sys.argv[1]), log_level="critical", timeout_graceful_shutdown=1)
