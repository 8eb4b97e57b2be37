"""Answer many searches at once: on several processes, from a file of earlier runs where it has them.

A search is a generator that asks for `Point`s (see `capacity`). Every answer is appended to the journal
as soon as it is there, one line of JSON each, so that an interrupted job goes on where it was: the same
searches ask the same questions. Answers given by other code than today's are left out.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from multiprocessing import get_context
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from slos_serve.errors import SlosServeError
from slos_serve.sim.capacity.runs import Cell, run_cell
from slos_serve.sim.capacity.search import Answer, Point, Question, RunOutcome

if TYPE_CHECKING:
    from typing import Self

SOURCES = ("core", "sim", "traces", "config.py")
PRESENTATION = frozenset(  # no outcome depends on these
    f"sim/capacity/{name}.py" for name in ("search", "jobs", "study", "table", "detail", "plots", "report", "sizing")
)


def code_digest() -> str:
    """Return a digest of the code and hardware files that outcomes depend on."""
    digest = hashlib.sha256()
    for name, text in sorted(_sources(files("slos_serve"), "")):
        if name.startswith(SOURCES) and name.endswith((".py", ".json")) and name not in PRESENTATION:
            digest.update(name.encode() + text())
    return digest.hexdigest()[:16]


def _sources(folder: Traversable, prefix: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield every file below a folder: its path and how to read it."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry.read_bytes


class Journal:
    """Outcomes by cell, kept in a file. `num_foreign`: lines that other code wrote, which are not used.

    Those of the systems in `reuse` are used all the same, where today's code has written none; `num_reused`
    counts them.
    """

    def __init__(self, path: Path | None, *, code: str | None = None, reuse: Collection[str] = ()) -> None:
        self.path = path
        self.code = code_digest() if code is None else code
        self.reuse = frozenset(reuse)
        self.num_foreign = self.num_reused = 0
        self._outcomes: dict[str, RunOutcome] = {}
        self._file: IO[str] | None = None
        if path is not None and path.exists():
            self._read(path)

    def __enter__(self) -> Self:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
            self._file = self.path.open("a", encoding="utf-8")
            if torn:
                self._file.write("\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._outcomes)

    def _read(self, path: Path) -> None:
        earlier: list[tuple[str, RunOutcome]] = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                outcome = RunOutcome(
                    by_class={name: tuple(counts) for name, counts in row["by_class"].items()},
                    drain_s=row["drain_s"],
                    stopped=row["stopped"],
                )
                key, code = str(row["key"]), row["code"]
                system = str(json.loads(key)["system"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # the line that an interruption cut short
            if code == self.code:
                self._keep(key, outcome)
            elif self.reuse and system in self.reuse:
                earlier.append((key, outcome))
            else:
                self.num_foreign += 1
        self.num_reused = len(earlier)
        for key, outcome in reversed(earlier):  # the latest first: what is known is not replaced
            self._keep(key, outcome)

    def _keep(self, key: str, outcome: RunOutcome) -> None:
        known = self._outcomes.get(key)
        if known is None or known.stopped:
            self._outcomes[key] = outcome

    def find(self, cell: Cell) -> RunOutcome | None:
        """Return the outcome of a cell; one that was stopped answers only a cell that may be."""
        outcome = self._outcomes.get(cell.key())
        return None if outcome is None or (outcome.stopped and not cell.may_stop) else outcome

    def add(self, cell: Cell, outcome: RunOutcome) -> None:
        """Keep an outcome, on disk at once."""
        self._keep(cell.key(), outcome)
        if self._file is not None:
            print(json.dumps({"key": cell.key(), "code": self.code, **asdict(outcome)}), file=self._file, flush=True)


@dataclass(slots=True, kw_only=True)
class SearchJob:
    """One search under way. `cell_of` says which run a point is; `error` why it ended without an answer."""

    name: str
    search: Question
    cell_of: Callable[[Point], Cell]
    answer: Answer | None = None
    error: str = ""
    is_done: bool = False
    _asked: list[Point] = field(default_factory=list)

    def step(self, journal: Journal) -> list[Cell]:
        """Go on as far as the journal's answers go; return the runs that are needed next, none at the end."""
        if not self._asked:
            self._asked = next(self.search)
        while True:
            cells = [self.cell_of(point) for point in self._asked]
            outcomes = [journal.find(cell) for cell in cells]
            missing = [cell for cell, outcome in zip(cells, outcomes, strict=True) if outcome is None]
            if missing:
                return missing
            answers = {p: o for p, o in zip(self._asked, outcomes, strict=True) if o is not None}
            try:
                self._asked = self.search.send(answers)
            except StopIteration as stop:
                self.answer, self.is_done = stop.value, True
                return []

    def fail(self, error: BaseException) -> None:
        """End without an answer."""
        self.error = f"{type(error).__name__}: {error}"
        self.is_done = True
        self.search.close()


OnProgress = Callable[[int, int, str], None]
RunFunction = Callable[[Cell], RunOutcome]


class WorkerError(SlosServeError):
    """A process that made runs is gone, so that no search can go on."""


class _Here(Executor):
    """Run in this process, at once: what is asked for is done when `submit` returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)
        return future


class _Work:
    """The searches, the runs that they wait for, and the runs that are under way."""

    def __init__(self, search_jobs: Sequence[SearchJob], journal: Journal, progress: OnProgress | None) -> None:
        self.waiting = deque(search_jobs)
        self.ready: deque[tuple[SearchJob, Cell]] = deque()
        self.pending: dict[Future[RunOutcome], tuple[SearchJob, Cell]] = {}
        self.num_runs = self.num_done = 0
        self._open: Counter[str] = Counter()
        self._journal = journal
        self._progress = progress

    def fill(self, pool: Executor, width: int, run: RunFunction) -> None:
        """Keep `width` runs under way, of searches that have begun before new ones."""
        while len(self.pending) < width and (self.ready or self.waiting):
            if self.ready:
                search_job, cell = self.ready.popleft()
                self.pending[pool.submit(run, cell)] = search_job, cell
            else:
                self._advance(self.waiting.popleft())

    def collect(self) -> None:
        """Wait for a run, keep its outcome, and let its search go on when it was the last one asked for."""
        finished, _ = wait(self.pending, return_when=FIRST_COMPLETED)
        for future in finished:
            search_job, cell = self.pending.pop(future)
            self._open[search_job.name] -= 1
            try:
                self._journal.add(cell, future.result())
            except BrokenExecutor as error:
                raise WorkerError(
                    f"a process that made runs has ended ({error}): fewer --jobs need less memory"
                ) from error
            except Exception as error:  # noqa: BLE001 - of one search: the others go on
                self._fail(search_job, error)
                continue
            self.num_runs += 1
            self._tell()
            if not search_job.is_done and not self._open[search_job.name]:
                self._advance(search_job)

    def _advance(self, search_job: SearchJob) -> None:
        try:
            cells = search_job.step(self._journal)
        except Exception as error:  # noqa: BLE001 - of one search: the others go on
            self._fail(search_job, error)
            return
        if search_job.is_done:
            self.num_done += 1
            self._tell(search_job.name)
        self._open[search_job.name] = len(cells)
        self.ready.extend((search_job, cell) for cell in cells)

    def _fail(self, search_job: SearchJob, error: BaseException) -> None:
        if search_job.is_done:
            return
        search_job.fail(error)
        self.ready = deque((other, cell) for other, cell in self.ready if other is not search_job)
        self.num_done += 1
        self._tell(search_job.name)

    def _tell(self, name: str = "") -> None:
        if self._progress is not None:
            self._progress(self.num_done, self.num_runs, name)


def run_searches(
    search_jobs: Sequence[SearchJob],
    journal: Journal,
    *,
    jobs: int = 1,
    progress: OnProgress | None = None,
    run: RunFunction = run_cell,
) -> None:
    """Carry every search to its answer or its error. `progress` gets searches done, runs made, and one that ended."""
    work = _Work(search_jobs, journal, progress)
    pool: Executor = _Here()
    if jobs > 1:
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_ignore_interrupts)
    try:
        while work.waiting or work.ready or work.pending:
            work.fill(pool, 1 if jobs == 1 else jobs + 1, run)
            if work.pending:
                work.collect()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the process that holds the journal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
