"""Arrays on disk that grow: .npy files written row by row, then memory-mapped like any other.

array = GrowingArray(Path("tokens.npy"), np.uint16)
array.append(np.arange(10))
array.close()
np.load("tokens.npy", mmap_mode="r")
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


class GrowingArray:
    """Rows of numbers, or of `width` numbers each, appended to a file that is whole once it is closed.

    numpy pads the header of its files so that the first axis can be lengthened without moving the data.
    """

    def __init__(self, path: Path, dtype: type, *width: int) -> None:
        self.file = path.open("wb")
        self.dtype, self.width, self.length = np.dtype(dtype), width, 0
        self._write_header()
        self.begin = self.file.tell()

    def _write_header(self) -> None:
        shape = (self.length, *self.width)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows: np.ndarray) -> None:
        """Write rows, cast to the array's type."""
        self.file.write(rows.astype(self.dtype).tobytes())
        self.length += len(rows)

    def close(self) -> None:
        """Write the final length into the header."""
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.begin, "the header outgrew its place"
        self.file.close()
