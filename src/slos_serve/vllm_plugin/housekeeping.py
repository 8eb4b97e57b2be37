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
    from slos_serve.vllm_plugin.parts import Parts

logger = logging.getLogger("vllm.slos_serve")

TICK_S = 0.5
SAVE_EVERY_S = 5.0  # a millisecond of CPU; vLLM kills the engine at SIGTERM, so that the last save is what is kept


class Housekeeper:
    """Run the thread beside one scheduler; it starts at once."""

    def __init__(self, parts: Parts, control_address: str | None) -> None:
        self._parts = parts
        self._control = ControlServer(control_address, self._answer)
        self._report_at = time.monotonic() + parts.settings.report_s
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
            return self._parts.explainer.answer(str(question["explain"]))
        return self.set_mode(question["mode"], question.get("class"))

    def set_mode(self, mode: str | None, slo_class: str | None = None) -> dict[str, Any]:
        """Change the mode as `Standing.order` does, tell everybody at once, and return what holds then."""
        parts = self._parts
        parts.standing.order(mode, slo_class)
        parts.outbox.heartbeat(parts.clock.peek(), at_once=True)
        return parts.standing.facts()

    def _run(self) -> None:
        parts = self._parts
        try:
            parts.tracker.thinking_end = view.thinking_end(parts.scheduler, parts.settings.thinking_end)
        except Exception as error:  # noqa: BLE001 - thinking is then graded as answer
            logger.info("SLO scheduler: no end-of-thinking token known (%s)", error)
        while not self._is_stopping:
            try:
                self._control.serve(TICK_S)
                if not self._is_stopping:
                    self.tick()
            except Exception as error:  # noqa: BLE001 - the thread must go on
                parts.faults.add("housekeeping", error)
        self._control.close()

    def tick(self) -> None:
        """Do what is due."""
        parts, now = self._parts, time.monotonic()
        parts.watchdog.interrupt()
        parts.learner.poll()
        parts.recorder.flush()
        parts.outbox.heartbeat(parts.clock.peek())
        if now >= self._save_at:
            self._save_at = now + SAVE_EVERY_S
            parts.learnt.save()
        if parts.settings.report_s and now >= self._report_at:
            self._report_at = now + parts.settings.report_s
            tally = parts.promises.tally
            if tally.is_news:
                for line in tally.text(parts.outbox.snapshot).splitlines():
                    logger.info("%s", line)
