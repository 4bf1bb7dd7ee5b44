"""The messages of the Open Inference Protocol's REST side: bytes to tensors, tensors to bytes; no I/O.

Wire format: KServe's "Open Inference Protocol v2" and Triton's extensions *binary tensor data*, *classification* and
*parameters*. Compared with recordings of a real Triton; one thing is different on purpose: a client's mistake is
always a 400 here, where Triton answers some with 500, and a number out of range is refused, not wrapped.

Shapes: N images of a request, H and W pixels, T top classes, C classes.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topfive_server.errors import BadRequestError

INPUT: Final = "image"
DATATYPES: Final = {"probabilities": "FP32", "classes": "INT64", "scores": "FP32"}
"""Outputs and their wire types, in the order in which they are sent by default."""
HEADER_LENGTH: Final = "inference-header-content-length"
_CHEAP_VALUES: Final = 2000
"""So many numbers or texts are encoded or compressed on the event loop; it takes a few milliseconds."""
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


class ProtocolError(Exception):
    """A request that breaks the protocol, with the HTTP status that says so; the message goes to the client."""

    def __init__(self, message: str, status: int = 400, code: str = BadRequestError.code) -> None:
        """`code`: of the error of /v1 that is meant, for the log and the metrics."""
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a served model takes and gives."""

    name: str
    side: int
    """Side of the input square, in pixels."""
    classes: int
    max_batch: int
    """Most images in one request."""
    labels: tuple[str, ...]

    def shape(self, output: str) -> list[int]:
        """Declared shape of an output, -1 for the batch."""
        return [-1, self.classes if output == "scores" else min(5, self.classes)]


@dataclass(frozen=True, kw_only=True)
class WantedOutput:
    """One output that the client asked for."""

    name: str
    binary: bool
    classification: int
    """Return this many "value:index:label" texts instead of the tensor; 0 returns the tensor."""


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A parsed request."""

    id: str | None
    images_NHWC: NDArray[np.uint8]
    outputs: tuple[WantedOutput, ...]
    timeout_s: float | None
    """From the `timeout` parameter (microseconds)."""
    priority: int
    """From the `priority` parameter: 1 is the highest, 0 the default."""


def parse_request(body: bytes, header_length: str | None, interface: Interface) -> InferRequest:
    """Parse an inference request.

    Args:
        body: decompressed.
        header_length: value of `Inference-Header-Content-Length`, or None: the body is all JSON.
        interface: of the model that the request is for.

    Raises:
        ProtocolError: it breaks the protocol, or does not fit the model.
    """
    length = len(body)
    if header_length is not None:
        try:
            length = int(header_length)
        except ValueError:
            length = -1
        if not 0 <= length <= len(body):
            raise ProtocolError(
                f"inference header size should be in range (0, {len(body)}), got: {header_length[:40]}"
            )
    if header_length is not None and length == 0:
        return _raw_request(body, interface)
    return parse_message(_json(body[:length]), body[length:] if length < len(body) else b"", interface)


def parse_message(header: Mapping[str, Any], binary: bytes, interface: Interface) -> InferRequest:
    """Parse a request whose JSON part (or the like of it) is read already; `binary` follows it.

    Raises:
        ProtocolError: it breaks the protocol, or does not fit the model.
    """
    inputs = _member(header, "inputs", list, "the request")
    parameters = _parameters(header, "the request")
    if len(inputs) != 1 or not isinstance(inputs[0], dict):
        names = ",".join(
            f"'{i['name']}'" for i in inputs if isinstance(i, dict) and isinstance(i.get("name"), str)
        )
        raise ProtocolError(
            f"expected 1 inputs but got {len(inputs)} inputs for model '{interface.name}'. Got input(s) [{names[:200]}], "
            f"but the required input is ['{INPUT}']"
        )
    id_ = header.get("id")
    if id_ is not None and not isinstance(id_, str):
        raise ProtocolError("Unable to parse 'id': it must be a string")
    return InferRequest(
        id=id_,
        images_NHWC=_images(inputs[0], binary, interface),
        outputs=_outputs(header, parameters, interface),
        timeout_s=_whole_number(parameters, "timeout") / 1e6 or None,
        priority=_whole_number(parameters, "priority"),
    )


def _raw_request(body: bytes, interface: Interface) -> InferRequest:
    """No JSON at all: the body is the one input's tensor, and all outputs come back in binary."""
    size = interface.side**2 * 3
    if len(body) != size:
        raise ProtocolError(
            f"input byte size mismatch for input 'raw_input' for model '{interface.name}'. "
            f"Expected {size}, got {len(body)}"
        )
    outputs = tuple(WantedOutput(name=name, binary=True, classification=0) for name in DATATYPES)
    images_NHWC = np.frombuffer(body, np.uint8).reshape(1, interface.side, interface.side, 3)
    return InferRequest(id=None, images_NHWC=images_NHWC, outputs=outputs, timeout_s=None, priority=0)


def _images(tensor: Mapping[str, Any], binary: bytes, interface: Interface) -> NDArray[np.uint8]:
    name, model = _member(tensor, "name", str, "an input"), interface.name
    if name != INPUT:
        raise ProtocolError(f"unexpected inference input '{name[:80]}' for model '{model}'")
    datatype = _member(tensor, "datatype", str, f"input '{name}'")
    shape = _member(tensor, "shape", list, f"input '{name}'")
    if not all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in shape):
        raise ProtocolError("Unable to parse 'shape': every dimension must be a whole number from 0 on")
    if datatype != "UINT8":
        raise ProtocolError(
            f"inference input '{name}' data-type is '{datatype[:20]}', but model '{model}' expects 'UINT8'"
        )
    side = interface.side
    if len(shape) != 4 or shape[1:] != [side, side, 3]:
        got = ",".join(map(str, shape[:8]))
        raise ProtocolError(
            f"unexpected shape for input '{name}' for model '{model}'. Expected [-1,{side},{side},3], got [{got}]"
        )
    if not 1 <= shape[0] <= interface.max_batch:
        raise ProtocolError(
            f"inference request batch-size must be >= 1 and <= {interface.max_batch} for '{model}', got {shape[0]}"
        )
    parameters = _parameters(tensor, f"input '{name}'")
    if "shared_memory_region" in parameters:
        raise ProtocolError("shared memory is not supported; send the tensor in the body")
    expected = shape[0] * side * side * 3
    if "binary_data_size" in parameters:
        return _binary_images(parameters, binary, expected, interface).reshape(shape)
    if "data" not in tensor:
        raise ProtocolError(f"input '{name}' must set 'data', or 'binary_data_size' in its parameters")
    if binary:
        raise ProtocolError(f"unexpected additional input data for model '{model}'")
    return _json_images(tensor["data"], expected, depth=len(shape)).reshape(shape)


def _binary_images(
    parameters: Mapping[str, Any], binary: bytes, expected: int, interface: Interface
) -> NDArray[np.uint8]:
    size, model = _whole_number(parameters, "binary_data_size"), interface.name
    if size != expected:
        raise ProtocolError(
            f"input byte size mismatch for input '{INPUT}' for model '{model}'. Expected {expected}, got {size}"
        )
    if len(binary) < size:
        missing = size - len(binary)
        raise ProtocolError(
            f"unexpected size for input '{INPUT}', expecting {missing} additional bytes for model '{model}'"
        )
    if len(binary) > size:
        raise ProtocolError(f"unexpected additional input data for model '{model}'")
    return np.frombuffer(binary, np.uint8)


def _json_images(data: Any, expected: int, *, depth: int) -> NDArray[np.uint8]:
    """Whole numbers in a list, or in lists up to `depth` deep, each as long as its neighbours.

    NumPy sees them last: of a list of texts it would make an array in which each is as long as the longest.
    """
    for _ in range(depth - 1):
        if not isinstance(data, list) or set(map(type, data)) != {list}:
            break
        lengths = set(map(len, data))
        data = [*chain.from_iterable(data)] if len(lengths) == 1 else []
    if not isinstance(data, list) or len(data) != expected or set(map(type, data)) != {int}:
        raise ProtocolError(
            f"Unable to parse 'data': it must hold {expected} whole numbers, flat or nested as the shape"
        )
    try:
        return np.frombuffer(bytes(data), np.uint8)
    except ValueError:
        raise ProtocolError("Unable to parse 'data': UINT8 values must be between 0 and 255") from None


def _outputs(
    header: Mapping[str, Any], parameters: Mapping[str, Any], interface: Interface
) -> tuple[WantedOutput, ...]:
    binary = parameters.get("binary_data_output") is True
    wanted = header.get("outputs")
    if wanted is None or wanted == []:
        return tuple(WantedOutput(name=name, binary=binary, classification=0) for name in DATATYPES)
    if not isinstance(wanted, list) or not all(isinstance(item, dict) for item in wanted):
        raise ProtocolError("Unable to parse 'outputs': it must be an array of objects")
    outputs = []
    for item in wanted:
        name = _member(item, "name", str, "an output")
        if name not in DATATYPES:
            raise ProtocolError(
                f"unexpected inference output '{name[:80]}' for model '{interface.name}'; it has {', '.join(DATATYPES)}"
            )
        own = _parameters(item, f"output '{name}'")
        if "shared_memory_region" in own:
            raise ProtocolError("shared memory is not supported; outputs come in the body")
        as_binary = own.get("binary_data", binary) is True
        outputs.append(
            WantedOutput(name=name, binary=as_binary, classification=_whole_number(own, "classification"))
        )
    if len({output.name for output in outputs}) < len(outputs):
        raise ProtocolError("an output is asked for twice")
    return tuple(outputs)


def encode_response(
    request: InferRequest, arrays: Mapping[str, NDArray[Any]], interface: Interface, version: str
) -> tuple[bytes, int | None]:
    """The response's body, and the length of its JSON part when binary tensors follow.

    Args:
        request: which outputs, and how.
        arrays: every output, by name, [N, ...].
        interface: of the model that answered.
        version: of the model that answered.
    """
    rows: list[str] = []
    parts: list[bytes] = []
    for wanted in request.outputs:
        row, values = describe_output(wanted, arrays[wanted.name], interface)
        if wanted.binary:
            parts.append(to_binary(values))
            row["parameters"] = {"binary_data_size": len(parts[-1])}
            rows.append(_ENCODER.encode(row))
        else:
            # Image by image: each is one call into C, in which no other thread gets the interpreter.
            data = ",".join(_ENCODER.encode(numbers.tolist())[1:-1] for numbers in values)
            rows.append(f'{_ENCODER.encode(row)[:-1]},"data":[{data}]}}')
    head = {"id": request.id} if request.id is not None else {}
    head |= {"model_name": interface.name, "model_version": version}
    text = f'{_ENCODER.encode(head)[:-1]},"outputs":[{",".join(rows)}]}}'.encode()
    return b"".join([text, *parts]), len(text) if parts else None


def is_costly(request: InferRequest, arrays: Mapping[str, NDArray[Any]], *, compressed: bool = False) -> bool:
    """Whether its answer takes more than a few milliseconds to encode, and so not on the event loop."""
    values = (
        arrays[output.name].size
        for output in request.outputs
        if compressed or output.classification or not output.binary
    )
    return sum(values) >= _CHEAP_VALUES


def describe_output(
    wanted: WantedOutput, array: NDArray[Any], interface: Interface
) -> tuple[dict[str, Any], NDArray[Any]]:
    """Name, datatype and shape of an output as it is sent, and its values: numbers, or texts (dtype object)."""
    if wanted.classification:
        labels = interface.labels if wanted.name == "scores" else None
        array = np.array(_classification(array, wanted.classification, labels), object)
    datatype = "BYTES" if wanted.classification else DATATYPES[wanted.name]
    return {"name": wanted.name, "datatype": datatype, "shape": list(array.shape)}, array


def to_binary(values: NDArray[Any]) -> bytes:
    """Little-endian numbers; texts each behind its length (the binary tensor data extension)."""
    if values.dtype != object:
        return bytes(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
    texts = (text.encode() for text in values.ravel())
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _classification(array: NDArray[Any], count: int, labels: Sequence[str] | None) -> list[list[str]]:
    """The extension's "value:index" or "value:index:label", largest value first."""
    order = np.argsort(-array, axis=1, kind="stable")[:, :count]
    is_float = array.dtype.kind == "f"
    lines = []
    for row, indices in zip(array, order.tolist(), strict=True):
        texts = (f"{row[i]:f}:{i}" if is_float else f"{row[i]}:{i}" for i in indices)
        lines.append(
            [
                text if labels is None else f"{text}:{labels[i]}"
                for text, i in zip(texts, indices, strict=True)
            ]
        )
    return lines


def _json(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode())
        if b"\\ud" in text or b"\\uD" in text:
            # Half a surrogate pair is no character (RFC 8259 section 8.2); no answer could repeat it.
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"failed to parse the request JSON buffer: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise ProtocolError("failed to parse the request JSON buffer: it must be an object")
    return header


def _member(record: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = record.get(name)
    if not isinstance(value, kind):
        words = "an array" if kind is list else "a string"
        found = "is missing" if name not in record else f"must be {words}"
        raise ProtocolError(f"Unable to parse '{name}': in {where} it {found}")
    return value


def _parameters(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    value = record.get("parameters", {})
    if not isinstance(value, dict):
        raise ProtocolError(f"Unable to parse 'parameters': in {where} it must be an object")
    return value


def _whole_number(parameters: Mapping[str, Any], name: str) -> int:
    value = parameters.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ProtocolError(f"Unable to parse '{name}': it must be a whole number from 0 on")
    return value
