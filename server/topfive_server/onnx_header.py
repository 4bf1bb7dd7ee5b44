"""Reads what an ONNX file says of itself, without its weights: metadata, inputs, outputs.

Opening a session for that would read and hold all of a 244 MB file, and so would the `onnx` package.
An ONNX file is one protobuf message (`onnx.proto3`: ModelProto), whose fields carry their length: the reader below
steps over the weights with `seek` and touches a few kilobytes. A file that ends before a length says it should is
half-copied, and is reported so. The file is read, never mapped: a mapped file that shrinks kills the process.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

UINT8: Final = 2
"""`TensorProto.DataType.UINT8`."""
FLOAT: Final = 1
"""`TensorProto.DataType.FLOAT`."""
INT64: Final = 7
"""`TensorProto.DataType.INT64`."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MAX_TEXT: Final = 64 << 20
"""Longest metadata value or tensor description that is read, in bytes; longer ones are no header."""


class OnnxHeaderError(ValueError):
    """Not an ONNX file, or only a part of one; the message completes the sentence 'model.onnx ...'."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Declared type of one graph input or output."""

    name: str
    element_type: int
    """`TensorProto.DataType`; 0 where the file does not say."""
    shape: tuple[int | str, ...] | None
    """A dimension is its size, or its symbolic name (empty where it has none); None: not even the rank is known."""


@dataclass(frozen=True, kw_only=True)
class OnnxHeader:
    """What the file says of itself."""

    metadata: dict[str, str]
    """`metadata_props`."""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Field:
    """One protobuf field: a number, or the span of a string, message or packed list within the file."""

    number: int
    begin: int
    """Of its tag; `start` is that of what it holds."""
    start: int
    stop: int
    value: int | None


def read_header(path: Path) -> OnnxHeader:
    """Read the header of the ONNX file at `path`.

    Raises:
        OnnxHeaderError: truncated, empty, or not an ONNX file.
        OSError: the file cannot be read.
    """
    metadata: dict[str, str] = {}
    inputs: list[TensorInfo] = []
    outputs: list[TensorInfo] = []
    graphs = 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise OnnxHeaderError("is empty (0 bytes)")
        for field in fields(file, 0, size):
            if field.number == 7 and field.value is None:  # ModelProto.graph
                graphs += 1
                for part in fields(file, field.start, field.stop):
                    if part.number == 11 and part.value is None:  # GraphProto.input
                        inputs.append(_tensor_info(file, part))
                    elif part.number == 12 and part.value is None:  # GraphProto.output
                        outputs.append(_tensor_info(file, part))
            elif field.number == 14 and field.value is None:  # ModelProto.metadata_props
                entry = {part.number: part for part in fields(file, field.start, field.stop)}
                if 1 in entry:
                    metadata[_text(file, entry[1])] = _text(file, entry[2]) if 2 in entry else ""
    if graphs != 1:
        raise OnnxHeaderError("is not an ONNX file, or is cut off before its graph")
    return OnnxHeader(metadata=metadata, inputs=tuple(inputs), outputs=tuple(outputs))


def _tensor_info(file: BinaryIO, value_info: Field) -> TensorInfo:
    """ValueInfoProto: name = 1, type = 2; TypeProto.tensor_type = 1; Tensor: elem_type = 1, shape = 2."""
    name, element_type, shape = "", 0, None
    for field in fields(file, value_info.start, value_info.stop):
        if field.number == 1:
            name = _text(file, field)
        elif field.number == 2:
            for kind in fields(file, field.start, field.stop):
                if kind.number != 1:
                    continue
                for part in fields(file, kind.start, kind.stop):
                    if part.number == 1 and part.value is not None:
                        element_type = part.value
                    elif part.number == 2:
                        shape = tuple(_dimensions(file, part))
    return TensorInfo(name=name, element_type=element_type, shape=shape)


def _dimensions(file: BinaryIO, shape: Field) -> Iterator[int | str]:
    """TensorShapeProto.dim = 1; Dimension: dim_value = 1, dim_param = 2."""
    for dim in fields(file, shape.start, shape.stop):
        if dim.number == 1:
            value: int | str = ""
            for part in fields(file, dim.start, dim.stop):
                if part.number == 1 and part.value is not None:
                    value = part.value
                elif part.number == 2 and part.value is None:
                    value = _text(file, part)
            yield value


def fields(file: BinaryIO, start: int, stop: int) -> Iterator[Field]:
    """The fields of the message that fills bytes `start` to `stop`; the caller may seek in between."""
    position = start
    while position < stop:
        file.seek(position)
        tag = _varint(file)
        number, wire_type = tag >> 3, tag & 7
        value: int | None = None
        if wire_type == _VARINT:
            value = _varint(file)
            begin = end = file.tell()
        elif wire_type == _LENGTH:
            length = _varint(file)
            begin = file.tell()
            end = begin + length
        elif wire_type in {_FIXED64, _FIXED32}:
            begin = file.tell()
            end = begin + (8 if wire_type == _FIXED64 else 4)
        else:
            raise OnnxHeaderError("is not an ONNX file")
        if number == 0:
            raise OnnxHeaderError("is not an ONNX file")
        if end > stop:
            raise OnnxHeaderError(
                f"is cut off or corrupt: it holds {stop:,} bytes and needs at least {end:,}"
            )
        yield Field(number, position, begin, end, value)
        position = end


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise OnnxHeaderError("is cut off: it ends in the middle of a field")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise OnnxHeaderError("is not an ONNX file")


def _text(file: BinaryIO, field: Field) -> str:
    if field.stop - field.start > _MAX_TEXT:
        raise OnnxHeaderError(f"has a text of {field.stop - field.start:,} bytes in its header")
    file.seek(field.start)
    try:
        return file.read(field.stop - field.start).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OnnxHeaderError("is not an ONNX file: a name in it is not text") from error
