"""Models: a zoo name or an .onnx file becomes a prepared ONNX graph with fixed shapes, and a Relax module."""

from __future__ import annotations

import hashlib
import html
import os
import traceback
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.checker import ValidationError
from onnx.external_data_helper import load_external_data_for_tensor

from tvmlab import zoo
from tvmlab.core import InputError
from tvmlab.prepare import op_types, prepare, with_identifiers
from tvmlab.shapes import Shape, check, constants, data_inputs, infer_shapes, set_shapes, shapes_of

__all__ = ["Model", "load_model", "models", "parameters_of"]


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """An ONNX graph with fixed shapes, ready to import.

    `original` is the graph as it was loaded, with its weights and shapes filled in: what onnxruntime should
    run. `onnx` is the prepared graph (`tvmlab.prepare.prepare`), which computes the same. `inputs` and
    `outputs` are shapes by name (an output dimension that depends on the data is None), `dtypes` numpy
    dtypes by name. `parameters` counts weight elements, the running statistics of normalisations left out;
    `flops` counts 2 x multiply-adds of Conv, ConvTranspose, Gemm and MatMul. `sha256` is of the file and
    its external data, or of a zoo model's graph, seed and batch.
    """

    name: str
    source: str
    sha256: str
    parameters: int
    flops: int
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, Shape]
    dtypes: dict[str, np.dtype]
    onnx: ModelProto = field(repr=False)
    original: ModelProto = field(repr=False)

    @cached_property
    def module(self) -> Any:
        """The Relax IRModule, one function `main` that takes the inputs in order; weights are constants.

        Raises InputError naming the operator that TVM's importer refuses.
        """
        from tvm.relax.frontend.onnx import from_onnx

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of every input that it renames
                return from_onnx(with_identifiers(self.onnx), keep_params_in_input=False)
        except Exception as error:  # the importer raises whatever type its converters happen to
            raise _import_error(self.name, error) from error

    def inputs_for(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs by name: normal floats, full-range bytes, 0 or 1 for wider integers.

        Those may be indices or masks, for which 0 and 1 are always valid.


        >>> load_model("squeezenet").inputs_for(seed=1)["data_0"].shape
        (1, 3, 224, 224)
        """
        return {name: _random_input(name, shape, self.dtypes[name], seed) for name, shape in self.inputs.items()}

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}, {self.parameters / 1e6:.1f} M parameters, {self.flops / 1e9:.2f} GFLOP, "
            f"{_text(self.inputs)} -> {_text(self.outputs)})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "source": self.source,
            "parameters": f"{self.parameters:,}",
            "FLOPs": f"{self.flops:,}",
            "inputs": _text(self.inputs),
            "outputs": _text(self.outputs),
            "operators": ", ".join(sorted(op_types(self.onnx.graph))),
            "sha256": self.sha256[:16],
        }
        left = "style='text-align:left'"
        cells = "".join(
            f"<tr><th {left}>{name}</th><td {left}>{html.escape(value)}</td></tr>" for name, value in rows.items()
        )
        return f"<table><caption>{html.escape(self.name)}</caption>{cells}</table>"


def models() -> pd.DataFrame:
    """The zoo: source, parameters, FLOPs at batch 1 and input shapes, by name.

    >>> models().loc["resnet18", "parameters"]
    np.int64(11689512)
    """
    rows = {name: _zoo_row(name) for name in zoo.ZOO}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")


@cache
def _zoo_row(name: str) -> dict[str, Any]:
    plan = zoo.blueprint(name)
    shapes = shapes_of(infer_shapes(plan.model))
    inputs = {value.name: shapes[value.name] for value in plan.model.graph.input if value.name not in plan.weights}
    return {
        "source": zoo.ZOO[name].source,
        "parameters": _count_parameters(plan.model.graph, plan.weights),
        "flops": _count_flops(plan.model.graph, shapes),
        "inputs": _text(inputs),
    }


def load_model(
    name_or_path: str | os.PathLike[str], batch: int = 1, seed: int = 0, dims: dict[str, int] | None = None
) -> Model:
    """Load a zoo model by name, or any .onnx file, and prepare it for TVM.

    `batch` is the size of dim 0 of the inputs: of a file's inputs where it is symbolic; where all are
    fixed, a batch other than 1 replaces it. `seed` makes the zoo's weights. `dims` gives the sizes of a
    file's other symbolic dimensions by name. External data is read from the file's own folder only.

    Raises InputError: unknown name; a file that is missing, damaged or not ONNX; external data that is
    missing or elsewhere; a dimension without a size; a batch size that cannot be set; operators that TVM
    cannot import.

    >>> load_model("squeezenet")
    Model('squeezenet', 1.2 M parameters, 0.70 GFLOP, data_0: 1x3x224x224 -> softmaxout_1: 1x1000x1x1)
    """
    for knob, value, least in (("batch", batch, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{knob}={value!r} is not usable", remedy=f"pass an integer of at least {least}")
    text = os.fspath(name_or_path)
    name = zoo.ALIASES.get(text, text)
    if name in zoo.ZOO:
        plan = zoo.blueprint(name)
        recipe = plan.model.SerializeToString(deterministic=True) + f"seed={seed} batch={batch}".encode()
        return _finish(
            name, zoo.fill(plan, seed), zoo.ZOO[name].source, hashlib.sha256(recipe).hexdigest(), batch, dims
        )
    original, sha256 = _file(text)
    return _finish(Path(text).stem, original, text, sha256, batch, dims)


def parameters_of(name_or_path: str) -> int:
    """The parameters of a model, without making a zoo model's weights or knowing what sizes symbolic dimensions have.

    Raises what `load_model` raises of a name or a file.

    >>> parameters_of("resnet18")
    11689512
    """
    name = zoo.ALIASES.get(name_or_path, name_or_path)
    if name in zoo.ZOO:
        return int(_zoo_row(name)["parameters"])
    graph = _file(name_or_path)[0].graph
    return _count_parameters(graph, _weights(graph))


def _file(text: str) -> tuple[ModelProto, str]:
    """The model in an .onnx file whose operators TVM imports, and its digest."""
    if not text.endswith(".onnx"):
        raise _unknown_name(text)
    original, sha256 = _read(Path(text))
    _refuse_unsupported(original, text)
    return original, sha256


def _finish(
    name: str, original: ModelProto, source: str, sha256: str, batch: int, dims: dict[str, int] | None
) -> Model:
    set_shapes(original, batch=batch, dims=dims)
    prepared = prepare(original)
    shapes = shapes_of(infer_shapes(original))
    inputs, outputs = data_inputs(original.graph), original.graph.output
    return Model(
        name=name,
        source=source,
        sha256=sha256,
        parameters=_count_parameters(original.graph, _weights(original.graph)),
        flops=_count_flops(original.graph, shapes),
        inputs={value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in inputs},
        outputs={value.name: shapes.get(value.name, ()) for value in outputs},
        dtypes={v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in (*inputs, *outputs)},
        onnx=prepared,
        original=original,
    )


def _unknown_name(text: str) -> InputError:
    known = [*zoo.ZOO, *zoo.ALIASES]
    close = get_close_matches(text.lower().replace("-", "_"), known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the zoo has {', '.join(zoo.ZOO)}."
    return InputError(f"unknown model {text!r}", remedy=f"{hint} The path of a file must end in .onnx")


def _read(path: Path) -> tuple[ModelProto, str]:
    """The model in a file with its external data, checked, and the digest of all that was read."""
    if path.is_dir():
        raise InputError(f"{path} is a directory", remedy="pass the .onnx file inside it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})", remedy="check the path") from None
    if not content:
        raise InputError(f"{path} is empty", remedy="export or download it again")
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise InputError(f"{path} is truncated or not an ONNX model", remedy="export or download it again") from None
    if not model.ir_version or not model.graph.node or not model.graph.output:
        raise InputError(f"{path} is not an ONNX model: it holds no graph", remedy="export or download it again")
    if model.graph.sparse_initializer:
        raise InputError(f"{path} has sparse initialisers", remedy="export it with dense weights")
    digest = hashlib.sha256(content)
    for data in _load_external(model.graph, path):
        digest.update(data)
    real_inputs = data_inputs(model.graph)
    del model.graph.input[:]
    model.graph.input.extend(real_inputs)
    model.ir_version = max(model.ir_version, 4)  # before, an initialiser had to be listed as an input
    check(model, str(path))
    return model, digest.hexdigest()


def _load_external(graph: GraphProto, path: Path) -> Iterator[bytes]:
    """Read the tensors that the file keeps outside itself, all locations checked first; yield their bytes."""
    tensors = [tensor for tensor in _tensors(graph) if tensor.data_location == TensorProto.EXTERNAL]
    for tensor in tensors:
        _check_external(tensor, path)
    for tensor in tensors:
        try:
            load_external_data_for_tensor(tensor, str(path.parent))
        except (OSError, ValueError, ValidationError) as error:
            raise InputError(
                f"cannot read the external data of {path} ({error})", remedy="copy its data file again"
            ) from None
        data = tensor.raw_data  # every access copies
        if len(data) != (size := _byte_size(tensor)):
            raise InputError(
                f"the external data of {tensor.name!r} in {path} has {len(data)} of {size} bytes",
                remedy="copy the whole data file again",
            )
        yield data


def _check_external(tensor: TensorProto, path: Path) -> None:
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    folder = path.parent.resolve()
    file = folder / location
    if not location or Path(location).is_absolute() or not file.resolve().is_relative_to(folder):
        raise InputError(
            f"{path} keeps {tensor.name!r} outside its own folder, at {location!r}",
            remedy="put the data file beside the .onnx file, and save the model with that location",
        )
    if not file.is_file():
        raise InputError(
            f"{path} needs its external data file {location!r}, which is missing",
            remedy=f"put it into {folder}",
        )


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor stored in a graph: initialisers, attributes, and those of nested graphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
            for nested in (attribute.g, *attribute.graphs):
                yield from _tensors(nested)


def _byte_size(tensor: TensorProto) -> int:
    width = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4}.get(tensor.data_type)
    bits = width or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return (prod(tensor.dims) * bits + 7) // 8


def _refuse_unsupported(model: ModelProto, what: str) -> None:
    """Raise InputError naming every operator type that TVM's importer has no converter for."""
    from tvm.relax.frontend.onnx import onnx_frontend

    known = {
        *onnx_frontend._get_convert_map(),
        "Constant",
        "If",
        *(function.name for function in model.functions),
    }
    used = op_types(model.graph).union(*(op_types(function) for function in model.functions))
    if missing := sorted(used - known):
        raise InputError(
            f"{what} uses operators that TVM cannot import: {', '.join(missing)}",
            remedy="export the model without them, or replace them by basic operators",
        )


def _import_error(name: str, error: Exception) -> InputError:
    """Which operator the importer was at: its loop's variable, as its own errors do not say."""
    at = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        if isinstance(node, NodeProto):
            at = f" at operator {node.op_type} ({node.name or ', '.join(node.output)})"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(
        f"TVM cannot import model {name!r}{at}: {lines[-1].strip()[:300]}",
        remedy="export the model without this operator, or with other attributes",
    )


def _random_input(name: str, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        limits = np.iinfo(dtype) if dtype.itemsize == 1 else None
        low, high = (limits.min, limits.max + 1) if limits else (0, 2)
        return rng.integers(low, high, shape, dtype=dtype)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def _weights(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    """The shapes of a graph's weights by name."""
    return {name: tuple(tensor.dims) for name, tensor in constants(graph) if _is_weight(tensor)}


def _is_weight(tensor: TensorProto) -> bool:
    """Whether a constant is a weight, not a shape, an index, a flag or a text."""
    return tensor.data_type not in (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING) and len(tensor.dims) > 0


def _count_parameters(graph: GraphProto, weights: dict[str, tuple[int, ...]]) -> int:
    statistics = {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}
    return sum(prod(shape) for name, shape in weights.items() if name not in statistics)


def _count_flops(graph: GraphProto, shapes: dict[str, Shape]) -> int:
    return sum(2 * _multiply_adds(node, shapes) for node in graph.node)


def _multiply_adds(node: NodeProto, shapes: dict[str, Shape]) -> int:
    """Multiplications of a node; 0 for operators that are not counted and where a shape is unknown."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    known = [_known(shapes.get(name, (None,))) for name in (*node.input[:2], node.output[0])]
    if not all(known):
        return 0
    a, b, result = known
    if node.op_type == "Conv":  # every result element is a sum over one filter
        return prod(result) * prod(b[1:])
    if node.op_type == "ConvTranspose":  # every input element is spread over one filter
        return prod(a) * prod(b[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return prod(result) * (a[0] if transposed else a[-1])


def _known(shape: Shape) -> tuple[int, ...]:
    """The shape if all of it is known, else an empty tuple."""
    sizes = tuple(size for size in shape if size is not None)
    return sizes if len(sizes) == len(shape) else ()


def _text(shapes: Mapping[str, Shape]) -> str:
    """Shapes as text, such as `data: 1x3x224x224`."""
    return ", ".join(f"{name}: {'x'.join('?' if d is None else str(d) for d in s)}" for name, s in shapes.items())
