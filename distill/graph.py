"""ONNX graphs, written node by node over weights that stay in a safetensors file.

    graph = Graph(folder / "model.safetensors")
    y = graph.node("MatMul", "x", graph.weight("head"))
    graph.save(folder / "model.onnx", inputs={"x": ...}, outputs={"y": (y, ...)})

The file holds the few kilobytes of structure; its initialisers point into the safetensors file beside it, byte
by byte (ONNX calls that external data). So weights are stored once, can be read by either format, and are mapped
into memory rather than copied, where the runtime allows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.checkpoint import write_atomically
from distill.config import UserError
from distill.sealed import changed
from distill.session import EXTRA, sha256

OPSET = 21
DTYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "I8": "INT8", "U8": "UINT8", "I64": "INT64"}
Shape = Sequence[int | str]  # a word is an axis of any length


class Graph:
    """Nodes and weights of one ONNX file. Names of values are the strings that the methods return."""

    def __init__(self, weights: Path) -> None:
        try:
            from onnx import TensorProto, helper, numpy_helper
        except ImportError:
            raise UserError(f"writing ONNX {EXTRA}") from None
        self._helper, self._numpy, self._types = helper, numpy_helper, TensorProto
        self._file = weights
        self._entries, self._data = _header(weights)
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}

    def nodes(self, operator: str, *inputs: str, results: int, domain: str = "", **attributes: Any) -> list[str]:
        """Add one node; returns the names of its results. An input "" is left out."""
        names = [f"{operator}_{len(self._nodes)}_{number}" for number in range(results)]
        self._nodes.append(self._helper.make_node(operator, inputs, names, domain=domain, **attributes))
        return names

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one result."""
        return self.nodes(operator, *inputs, results=1, domain=domain, **attributes)[0]

    def __contains__(self, name: str) -> bool:
        """Whether the safetensors file has a tensor of this name."""
        return name in self._entries

    def weight(self, name: str) -> str:
        """A tensor of the safetensors file, in the type it has there."""
        if name not in self._initializers:
            entry = self._entries[name]
            begin, end = entry["data_offsets"]
            tensor = self._types(name=name, dims=entry["shape"], data_location=self._types.EXTERNAL)
            tensor.data_type = getattr(self._types, DTYPES[entry["dtype"]])
            place = {"location": self._file.name, "offset": self._data + begin, "length": end - begin}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[name] = tensor
        return name

    def constant(self, value: Any, dtype: type = np.int64) -> str:
        """A small array inside the graph, such as a shape or a list of axes."""
        name = f"constant_{len(self._initializers)}"
        self._initializers[name] = self._numpy.from_array(np.array(value, dtype), name)
        return name

    def save(
        self,
        path: Path,
        inputs: Mapping[str, tuple[str, Shape]],
        outputs: Mapping[str, tuple[str, str, Shape]],
        sources: Sequence[Path] = (),
    ) -> None:
        """Write the file. `inputs`: name to (type, shape); `outputs`: name to (value, type, shape).

        The digests of the weights and of the files in `sources`, which they were made from, go with it.
        """
        helper = self._helper
        names = {value: name for name, (value, _, _) in outputs.items()}
        for node in self._nodes:  # an Identity to rename a result would copy it
            for values in (node.input, node.output):
                values[:] = [names.get(value, value) for value in values]
        described = [
            [helper.make_tensor_value_info(name, getattr(self._types, kind), shape) for name, kind, shape in rows]
            for rows in (
                [(name, *row) for name, row in inputs.items()],
                [(name, kind, shape) for name, (_, kind, shape) in outputs.items()],
            )
        ]
        graph = helper.make_graph(self._nodes, path.stem, *described, list(self._initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="potstill")
        digests = {file.name: sha256(file) for file in (self._file, *sources)}
        helper.set_model_props(model, digests)
        write_atomically(path, lambda target: target.write_bytes(model.SerializeToString()), "MODEL")


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors file by name, and where its data begins."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(size))
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: expected a safetensors file: {error}") from None
    entries.pop("__metadata__", None)
    return entries, 8 + size


def is_current(path: Path) -> bool:
    """Whether an ONNX file is there and goes with the weights beside it: those it reads, and those it was made from."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        return False
    try:
        properties = onnx.load(str(path), load_external_data=False).metadata_props
    except DecodeError:  # damaged
        return False
    weights = {entry.key: entry.value for entry in properties if entry.key.endswith(".safetensors")}
    return not changed(path.parent, weights)
