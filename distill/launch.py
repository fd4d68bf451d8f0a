"""Start a recipe in several processes on this machine's CPU.

    python -m distill.launch --processes 2 recipes/smoke.yaml [key=value ...]

`accelerate launch --cpu --num_processes 2` quietly starts a single process (accelerate 1.15): it
starts several only for an accelerator. So `recipes/accelerate/cpu2.yaml` asks for several in that
way, and the environment set here says that each of them is to compute on the CPU. Without the
environment that file gives two processes that each believe to be alone.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

CONFIG = Path(__file__).resolve().parent.parent / "recipes" / "accelerate" / "cpu2.yaml"
RUN = Path(__file__).resolve().with_name("run.py")


def environment(processes: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited` with what several CPU processes need; what the user has set stays, bar the device."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # One thread for each core in all; gloo needs an interface that surely resolves, loopback.
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    return {**defaults, **inherited, "ACCELERATE_USE_CPU": "true"}


def command(processes: int, arguments: Sequence[str]) -> list[str]:
    """The accelerate call; port 0 takes a free port, so that two runs can share a machine."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    return [*launch, "--num_processes", str(processes), "--main_process_port", "0", str(RUN), *arguments]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m distill.launch",
        description="Start a recipe in several processes on this machine's CPU.",
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="how many, 2 or more (2)")
    parser.add_argument("recipe", help="the recipe's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe to set")
    options = parser.parse_args(argv)
    if options.processes < 2:
        parser.error(f"--processes must be 2 or more, but is {options.processes}; for one: accelerate launch")
    if not CONFIG.is_file():
        parser.error(f"{CONFIG} is missing: run this from a checkout of Potstill (pip install --editable .)")
    arguments = command(options.processes, [options.recipe, *options.overrides])
    os.execve(arguments[0], arguments, environment(options.processes, os.environ))


if __name__ == "__main__":
    main()
