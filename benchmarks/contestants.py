"""Who takes part in `compare.py`: how each server is started, asked and read, and with what settings.

The services themselves are in `servers/`, one file each; this one knows their command lines and wire formats.
"""

import base64
import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.process import Served, free_port, running, serving

from topfive_server.devices import cores
from topfive_server.repository import ModelVersion

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = Path(__file__).with_name("servers") / "requirements"
BOUNDARY = "a-boundary-that-no-jpeg-contains"

Answer = list[dict[str, Any]]
"""Of one image, best first: `label`, `class`, `probability`."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One server with its settings: a row of the table."""

    name: str
    """In the table."""
    settings: str
    """What a reader must know, in one line."""
    path: str
    """Where images are POSTed."""
    body: Literal["image", "multipart", "v2"] = "image"
    """The JPEG itself, a form with one file, or JSON of the Open Inference Protocol with base64 in it."""
    headers: tuple[str, ...] = ()
    """More headers of a request, `Name: value`."""
    answer: Callable[[Any], Answer] = lambda answer: list(answer["top"])
    """The five labels in the parsed JSON of an answer."""
    environment: str = ""
    """Its folder beside the others' virtual environments, and the name of its requirements; empty for topfive."""
    module: str = ""
    """In `benchmarks.servers`."""
    ready: str = "/health"
    """Answers 200 when it is ready."""
    workers: int = 1
    """Processes with a session each; the cores are shared out among them."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """More environment variables."""
    models: Literal["same", "own"] = "same"
    """The one file that all serve, or topfive's best."""
    flags: tuple[str, ...] = ()
    """Of `topfive serve`."""


def topfive(name: str, settings: str, *flags: str, models: Literal["same", "own"]) -> Contestant:
    """A row of topfive itself."""
    return Contestant(
        name=name,
        settings=settings,
        path="/v1/classify",
        answer=lambda answer: list(answer["images"][0]["top"]),
        models=models,
        flags=("--device", "cpu", *flags),
    )


def two(contestant: Contestant, how: str) -> Contestant:
    """The same with a session of one thread for each core instead of one session on all cores."""
    values = {**vars(contestant), "name": f"{contestant.name}, {how}", "workers": cores()}
    return Contestant(
        **{**values, "settings": f"{contestant.settings.partition(';')[0]}; {how} with one thread each"}
    )


def contestants() -> dict[str, Contestant]:
    """All, by name, in the table's order."""
    mosec = Contestant(
        name="mosec",
        settings="batches of up to 32, 2 ms window; a decoding process per core, one session on all cores",
        path="/inference",
        environment="mosec",
        module="with_mosec",
        ready="/",
    )
    litserve = Contestant(
        name="LitServe",
        settings="batches of up to 32, 2 ms window; one worker, decoding on threads in `batch`, one session on all cores",
        path="/classify",
        environment="litserve",
        module="with_litserve",
    )
    triton = Contestant(
        name="Triton",
        settings="python backend, dynamic batches of up to 32; one instance, decoding on threads, one session on all cores",
        path="/v2/models/classify/infer",
        headers=("Inference-Header-Content-Length: 0",),
        environment="triton",
        ready="/v2/health/ready",
    )
    everyone = [
        topfive("topfive", "as installed", "--variant", "fp32", models="same"),
        mosec,
        two(mosec, "a worker per core"),
        litserve,
        two(litserve, "a worker per core"),
        triton,
        two(triton, "an instance per core"),
        Contestant(
            name="BentoML",
            settings="adaptive batches of up to 32; one worker, decoding on threads, one session on all cores; multipart",
            path="/classify",
            body="multipart",
            headers=(f"Content-Type: multipart/form-data; boundary={BOUNDARY}",),
            answer=lambda answer: list(answer[0]["top"]),
            environment="bentoml",
            module="with_bentoml",
            ready="/readyz",
        ),
        Contestant(
            name="MLServer",
            settings="adaptive batches of up to 32, 2 ms window; one process, decoding on threads, one session on all cores; base64 in JSON",
            path="/v2/models/classify/infer",
            body="v2",
            headers=("Content-Type: application/json",),
            answer=lambda answer: list(json.loads(answer["outputs"][0]["data"][0])["top"]),
            environment="mlserver",
            module="with_mlserver",
            ready="/v2/models/classify/ready",  # the server itself is ready before its model
        ),
        Contestant(
            name="Ray Serve",
            settings="batches of up to 32, 2 ms window; one replica, decoding on threads, one session on all cores",
            path="/",
            environment="rayserve",
            module="with_rayserve",
            ready="/-/healthz",
        ),
        Contestant(
            name="FastAPI",
            settings="uvicorn, one process, no batching; each request in a thread of the pool, one session on all cores",
            path="/classify",
            environment="fastapi",
            module="with_fastapi",
        ),
        topfive("topfive, its own fp32 graph", "band LRN", "--variant", "fp32", models="own"),
        topfive("topfive, its own int8 graph", "static int8", "--variant", "int8", models="own"),
    ]
    return {contestant.name: contestant for contestant in everyone}


# ---------------------------------------------------------------------- requests and answers


def body(kind: str, image: bytes) -> bytes:
    """One request's body."""
    if kind == "multipart":
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
        return head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()
    if kind == "v2":
        tensor = {
            "name": "image",
            "shape": [1],
            "datatype": "BYTES",
            "parameters": {"content_type": "base64"},
        }
        return json.dumps({"inputs": [{**tensor, "data": [base64.b64encode(image).decode()]}]}).encode()
    return image


def read_answer(contestant: Contestant, data: bytes, json_length: str | None) -> Answer:
    """The five labels; `json_length` is Triton's header, after which an answer has a length and then our JSON."""
    if json_length is not None:
        data = data[int(json_length) + 4 :]
    return contestant.answer(json.loads(data))


# ---------------------------------------------------------------------- starting


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What all are started with."""

    model: ModelVersion
    """The one file that all serve."""
    models: Path
    """The repository that it is in."""
    own: Path | None
    """The repository with topfive's best graphs."""
    environments: Path
    """Folder of the virtual environments."""

    def has(self, contestant: Contestant) -> bool:
        """Whether it can be started here."""
        if contestant.environment:
            return self._program(contestant, "python").exists()
        return contestant.models == "same" or self.own is not None

    def versions(self, contestant: Contestant) -> list[str]:
        """What is installed, as `pip freeze` says."""
        if not contestant.environment:
            return []
        code = "import importlib.metadata as m; print(*sorted(f'{d.name}=={d.version}' for d in m.distributions()))"
        command = [str(self._program(contestant, "python")), "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    @contextlib.contextmanager
    def start(self, contestant: Contestant) -> Iterator[Served]:
        """The server, ready; ended afterwards."""
        if not contestant.environment:
            models = self.models if contestant.models == "same" else self.own
            assert models is not None
            with serving(models, contestant.flags) as served:
                yield served
            return
        port = free_port(3)  # some want one or two more for gRPC and metrics
        with tempfile.TemporaryDirectory() as scratch:
            spec = Path(scratch) / "model.json"
            spec.write_text(self.model.spec.to_json(), encoding="utf-8")
            variables = {
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'client'}",
                "COMPARE_MODEL": str(self.model.path),
                "COMPARE_SPEC": str(spec),
                "COMPARE_PORT": str(port),
                "COMPARE_WORKERS": str(contestant.workers),
                "COMPARE_THREADS": str(cores() // contestant.workers),
                **contestant.variables,
            }
            command = self._command(contestant, port, Path(scratch))
            with running(
                command, f"http://127.0.0.1:{port}", ready=contestant.ready, environment=variables
            ) as served:
                yield served

    def _command(self, contestant: Contestant, port: int, scratch: Path) -> Sequence[str]:
        if contestant.environment == "triton":
            write_triton_repository(scratch / "models", contestant.workers)
            return [
                str(self._program(contestant, "tritonserver")),
                f"--model-repository={scratch / 'models'}",
                *("--http-address=127.0.0.1", f"--http-port={port}", "--grpc-address=127.0.0.1"),
                *(f"--grpc-port={port + 1}", f"--metrics-port={port + 2}", "--exit-timeout-secs=5"),
            ]
        if contestant.environment == "bentoml":
            target = f"benchmarks.servers.{contestant.module}:Service"
            program = str(self._program(contestant, "bentoml"))
            return [
                program,
                "serve",
                target,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--working-dir",
                str(ROOT),
            ]
        return [str(self._program(contestant, "python")), "-m", f"benchmarks.servers.{contestant.module}"]

    def _program(self, contestant: Contestant, name: str) -> Path:
        return self.environments / contestant.environment / "bin" / name


def write_triton_repository(folder: Path, instances: int) -> None:
    """A repository whose only model, `classify`, is `servers/with_triton.py`."""
    version = folder / "classify" / "1"
    version.mkdir(parents=True)
    service = Path(__file__).with_name("servers") / "with_triton.py"
    (version / "model.py").write_text(service.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "classify" / "config.pbtxt").write_text(
        f"""name: "classify"
backend: "python"
max_batch_size: 32
input [ {{ name: "image" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "answer" data_type: TYPE_STRING dims: [ 1 ] }} ]
dynamic_batching {{ }}
instance_group [ {{ count: {instances} kind: KIND_CPU }} ]
""",
        encoding="utf-8",
    )
