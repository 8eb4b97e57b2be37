"""The plug-in's own thread: what is slow, or must happen without traffic.

It answers questions (the mode), looks for the profile, finds the end-of-thinking token, writes files, sends
heartbeats and reports, and cuts off a planner that hangs.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.wire.control import ControlServer

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.runtime import SloRuntime

logger = logging.getLogger("vllm.slos_serve")

TICK_S = 0.5
SAVE_EVERY_S = 30.0


class Housekeeper:
    """Run the thread of one runtime; it starts at once."""

    def __init__(self, runtime: SloRuntime, control_address: str | None) -> None:
        self._runtime = runtime
        self._control = ControlServer(control_address, self._answer)
        self._report_at = time.monotonic() + runtime.settings.report_s
        self._save_at = time.monotonic() + SAVE_EVERY_S
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="slos-serve", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, at once but for what it is at."""
        if self._is_stopping:
            return
        self._is_stopping = True
        self._control.wake()
        self._thread.join(timeout=5)

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if "explain" in question:
            return self._runtime.explainer.answer(str(question["explain"]))
        return self._runtime.set_mode(question["mode"], question.get("class"))

    def _run(self) -> None:
        runtime = self._runtime
        try:
            runtime.tracker.thinking_end = view.thinking_end(runtime.scheduler, runtime.settings.thinking_end)
        except Exception as error:  # noqa: BLE001 - thinking is then graded as answer
            logger.info("SLO scheduler: no end-of-thinking token known (%s)", error)
        while not self._is_stopping:
            try:
                self._control.serve(TICK_S)
                if not self._is_stopping:
                    self.tick()
            except Exception as error:  # noqa: BLE001 - the thread must go on
                runtime.faults.add("housekeeping", error)
        self._control.close()

    def tick(self) -> None:
        """Do what is due."""
        runtime, now = self._runtime, time.monotonic()
        runtime.watchdog.bite()
        runtime.learner.poll()
        runtime.recorder.flush()
        runtime.outbox.beat(runtime.clock.peek())
        if now >= self._save_at:
            self._save_at = now + SAVE_EVERY_S
            runtime.learnt.save()
        if runtime.settings.report_s and now >= self._report_at:
            self._report_at = now + runtime.settings.report_s
            tally = runtime.promises.tally
            if tally.is_news:
                for line in tally.text(runtime.outbox.snapshot).splitlines():
                    logger.info("%s", line)
