"""What vLLM's own settings gain it: the simulated capacity of `vllm` with each of them, as a Markdown table.

    python benchmarks/vllm_settings.py --data DIR [--scenarios NAMES] [--hardware NAME] [--windows N]

`slos-serve capacity` tries these settings on tuning windows and reports the best; here each is measured, on the windows
that are reported there. A cell is the highest rate, in requests per second and GPU, at which every class attains 90 %.
The command can be interrupted: the runs so far are in `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from slos_serve.sim.capacity.jobs import Journal, run_searches
from slos_serve.sim.capacity.search import Answer, SearchEffort
from slos_serve.sim.capacity.study import Study
from slos_serve.terminal.progress import Bar

SYSTEM = "vllm"
TARGET = 0.9


def main() -> None:
    """Run every search and print the table, the default settings first and the best cell of a column in bold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of public trace files")
    parser.add_argument("--scenarios", default="chatbot,coding,summarization,mixed")
    parser.add_argument("--hardware", default="measured")
    parser.add_argument("--windows", type=int, default=3, help="windows per scenario (3)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument("--out", type=Path, default=Path("settings-report"))
    args = parser.parse_args()
    study = Study(
        scenarios=tuple(args.scenarios.split(",")),
        systems=(SYSTEM,),
        hardware=(args.hardware,),
        data=str(args.data.resolve()),
        async_lag=False,  # as in the tables of docs/capacity.md; steps that repeat are run many at once
        effort=SearchEffort(num_windows=args.windows, coarse_windows=1, steps=2, max_rates=3, higher_rates=0),
    )
    study.check()
    (site,) = study.sites
    grid = study.grid(SYSTEM)
    search_jobs = {(one, name): study.search_job(site, name, SYSTEM, [one]) for name in study.scenarios for one in grid}
    with Journal(args.out / "runs.jsonl") as journal, Bar(f"{len(search_jobs)} searches", len(search_jobs)) as bar:
        run_searches(list(search_jobs.values()), journal, jobs=args.jobs, progress=bar)
    columns = {name: [rate(search_jobs[one, name].answer) for one in grid] for name in study.scenarios}
    print(f"| settings of `{SYSTEM}` | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for row, settings in enumerate(grid):
        said = ", ".join(f"{key} {value}" for key, value in json.loads(settings).items()).replace("_", " ")
        print(f"| {said} | {' | '.join(cell(column[row], max(column)) for column in columns.values())} |")


def rate(answer: Answer | None) -> float:
    """Return the capacity that a search found, 0 for none."""
    return (answer.curve.capacity(TARGET) if answer else None) or 0.0


def cell(value: float, best: float) -> str:
    """Return a capacity as the table says it."""
    text = f"{value:.3g}" if value else "none"
    return f"**{text}**" if value and value == best else text


if __name__ == "__main__":
    main()
