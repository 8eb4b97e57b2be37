"""One server of vLLM's own: started, measured where nobody has, watched until it ends.

While a server is being profiled its `/health` answers 503, so that nothing is sent to it that would be
measured too; our own probe carries a header that it lets through.
"""

from __future__ import annotations

import json
import subprocess
import threading

from slos_serve.errors import SlosServeError
from slos_serve.serving import launch
from slos_serve.serving.prepare import Launch, measure, say
from slos_serve.serving.profiles import set_aside

ACCEPT_PROFILE_S = 60.0


def serve(plan: Launch, *, as_json: bool) -> int:
    """Run the server until it ends; return the status to exit with."""
    if plan.must_profile and plan.profile is not None:
        with set_aside(plan.profile):
            return _run(plan, as_json=as_json)
    return _run(plan, as_json=as_json)


def _run(plan: Launch, *, as_json: bool) -> int:
    where = f" at {plan.url}" if plan.url else ""
    say(f"starting vLLM with {plan.model_name}{where} ({plan.mode if plan.mode != 'none' else 'no SLOs'})")
    child = launch.start(plan.command, plan.env, stdout_to_stderr=as_json)
    failures: list[str] = []

    def make_ready() -> None:
        try:
            _make_ready(plan, child, as_json=as_json)
        except launch.ServerEndedError:
            pass  # its own log has said why, and its status is ours
        except Exception as error:  # noqa: BLE001 -- whatever it is, the server must not stay half ready
            failures.append(f"{type(error).__name__}: {error}")
            launch.end(child)

    def tell() -> None:
        say(f"vLLM was told to end {plan.patience_s:.0f} s ago and still waits for its connections: ending it")

    thread = threading.Thread(target=make_ready, name="make-ready", daemon=True)
    if plan.url:
        thread.start()
    try:
        code = launch.wait(child, patience_s=plan.patience_s, tell=tell)
    finally:
        launch.end(child)
    if plan.url:
        thread.join(timeout=5)
    if failures:
        say(f"not ready, so stopped: {' '.join(failures[0].split())}")
        return 1
    return launch.exit_status(code)


def _make_ready(plan: Launch, child: subprocess.Popen[bytes], *, as_json: bool) -> None:
    launch.wait_healthy(child, plan.url, probe=True)
    if plan.must_profile and plan.profile is not None and plan.record is not None:
        measure(plan, plan.profile, plan.record)
    if not launch.wait_healthy(child, plan.url, probe=False, timeout_s=ACCEPT_PROFILE_S):
        raise SlosServeError(f"the server did not take up {plan.profile} within {ACCEPT_PROFILE_S:.0f} s")
    say(f"ready: {plan.url}/v1")
    if as_json:
        document = {"url": plan.url, "model": plan.model_name, "mode": plan.mode}
        document["profile"] = str(plan.profile) if plan.profile else ""
        print(json.dumps(document), flush=True)
