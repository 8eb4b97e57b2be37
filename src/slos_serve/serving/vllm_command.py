"""vLLM's own `serve` command: `python -m slos_serve.serving.vllm_command MODEL [flags of vLLM]`.

vLLM's command line asks for the version of a package named `vllm`; its builds for CPUs are named otherwise, so that
question is answered from the module. What cannot be imported is told in one line: a vLLM without PyTorch, or one whose
scheduler is not where ours derives from it. Nothing of ours is imported here: each process that vLLM spawns imports
this module again.
"""

import importlib.metadata
import sys

MAIN = "vllm.entrypoints.cli.main"
SCHEDULERS = {"vllm.v1.core.sched.scheduler": "Scheduler", "vllm.v1.core.sched.async_scheduler": "AsyncScheduler"}


def main() -> None:
    """Run `vllm serve` with this process's arguments; status 2 where this vLLM cannot be started at all."""
    given = sys.argv[1:]
    try:
        if any(argument.startswith("slos_serve.vllm_plugin.scheduler") for argument in given):
            check_scheduler()
        serve = importlib.import_module(MAIN).main
    except ImportError as error:
        text = " ".join(str(error).split())
        print(f"slos-serve: the installed vLLM cannot be started: {text} (see slos-serve doctor)", file=sys.stderr)
        sys.exit(2)
    answer_for_other_names()
    sys.argv = ["vllm", "serve", *given]
    serve()


def check_scheduler() -> None:
    """Raise `ImportError` where vLLM's scheduler classes are not those that ours derive from."""
    for module, name in SCHEDULERS.items():
        if not hasattr(importlib.import_module(module), name):
            raise ImportError(f"{module} has no {name}, which slos-serve's scheduler derives from")


def answer_for_other_names() -> None:
    """Answer for the package `vllm` with the module's version where the module comes from a package of another name."""
    ask = importlib.metadata.version
    try:
        ask("vllm")
    except importlib.metadata.PackageNotFoundError:
        from vllm import __version__  # noqa: PLC0415

        importlib.metadata.version = lambda distribution_name: (
            __version__ if distribution_name == "vllm" else ask(distribution_name)
        )


if __name__ == "__main__":
    main()
