"""Carry out a recipe: `accelerate launch distill/run.py RECIPE [key=value ...]`.

The same as `accelerate launch -m distill.run RECIPE [key=value ...]`, from any working directory.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: `distill/` itself must not stand first on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main())
