"""Start a recipe in several processes on this machine's CPU.

    python -m distill.launch --processes 2 recipes/smoke.yaml [key=value ...]
    python -m distill.launch --processes 2 --config recipes/accelerate/fsdp2.yaml recipes/smoke.yaml

`accelerate launch --cpu --num_processes 2` quietly starts a single process (accelerate 1.15): it
starts several only for an accelerator. So `recipes/accelerate/cpu2.yaml` asks for several in that
way, and the environment set here says that each of them is to compute on the CPU. Without the
environment that file gives two processes that each believe to be alone. Any other of accelerate's
configurations can be tried on a CPU in the same way.
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


def command(
    processes: int, arguments: Sequence[str], config: Path = CONFIG, max_restarts: int = 0, script: Path = RUN
) -> list[str]:
    """The accelerate call; port 0 takes a free port, so that two runs can share a machine."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    options = {"num_processes": processes, "num_machines": 1, "main_process_port": 0, "max_restarts": max_restarts}
    return [*launch, *(word for k, v in options.items() for word in (f"--{k}", str(v))), str(script), *arguments]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m distill.launch",
        description="Start a recipe in several processes on this machine's CPU.",
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="how many, 2 or more (2)")
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="of accelerate (cpu2.yaml)")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="after a process has failed (0)")
    parser.add_argument("recipe", help="the recipe's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe to set")
    options = parser.parse_args(argv)
    if options.processes < 2:
        parser.error(f"--processes must be 2 or more, but is {options.processes}; for one: accelerate launch")
    if not options.config.is_file():
        hint = (
            "run this from a checkout of Potstill (pip install --editable .)"
            if options.config == CONFIG
            else "--config"
        )
        parser.error(f"{options.config} is missing: {hint}")
    words = [options.recipe, *options.overrides]
    arguments = command(options.processes, words, options.config, options.max_restarts)
    os.execve(arguments[0], arguments, environment(options.processes, os.environ))


if __name__ == "__main__":
    main()
