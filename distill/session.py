"""Running ONNX files of ours: an onnxruntime session, checked to go with the weights beside it. No torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any, NoReturn

EXTRA = "needs an extra: pip install 'potstill[onnx]'"


def refuse(message: str) -> NoReturn:
    """Raise a UserError. Its module brings pydantic, 18 MiB that a decoder with nothing to refuse does without."""
    from distill.config import UserError

    raise UserError(message) from None


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def release_freed_memory() -> None:
    """Give back what glibc keeps of freed memory: parsing a tokenizer or packing weights leaves 15 MiB of it."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session over a file of ours, on all cores unless told otherwise.

    The file names the weights it points into, and those of the student it was made from, by their digests.
    Raises UserError where onnxruntime or the file is missing or damaged, or any of these weights are others.
    """
    try:
        import onnxruntime
    except ImportError:
        refuse(f"running ONNX {EXTRA}")
    if not path.is_file():
        refuse(f"{path}: expected an ONNX file, found none; python -m distill.export makes it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    again = "make it again with python -m distill.export"
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen kinds, all straight from Exception
        refuse(f"{path}: cannot be loaded: {str(error).splitlines()[0]}; {again}")
    for name, digest in session.get_modelmeta().custom_metadata_map.items():
        weights = path.parent / Path(name).name  # what stands in the file may not lead elsewhere
        if weights.suffix == ".safetensors" and weights.is_file() and sha256(weights) != digest:
            refuse(f"{path}: was made for other weights than those in {weights}; {again}")
    return session
