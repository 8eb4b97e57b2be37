"""A thread for what may wait until the scheduler's own has handed its batch over: messages are made and sent there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

MAX_WAITING = 1000  # jobs; a thread that far behind is not coming back


class Sender:
    """Run jobs one after the other on a thread of its own; at once, on the caller's, after `close`.

    What a job raises goes to `failed`. A job that would be one too many is dropped and counted in `num_dropped`.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self.num_dropped = 0
        self._failed = failed
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="slos-serve-out", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        """Have a job done soon, after those before it."""
        if self._thread is None:
            self._do(job)
        elif self._jobs.qsize() < MAX_WAITING:
            self._jobs.put(job)
        else:
            self.num_dropped += 1

    def close(self) -> None:
        """Finish what is waiting and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join(timeout=5)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # noqa: BLE001 - one message that cannot be made keeps no other back
            self._failed(error)
