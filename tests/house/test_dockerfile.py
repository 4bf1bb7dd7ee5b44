"""The Dockerfile, replayed as far as a machine without a container engine allows.

COPY and the pip and venv steps are carried out in a scratch folder that stands for the image's root; what the image
would then start is started from there. What apt and useradd do is not replayed.
"""

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.server.onnx_models import write_model

ROOT = Path(__file__).resolve().parents[2]


class Instruction(NamedTuple):
    keyword: str
    text: str


def instructions() -> list[Instruction]:
    """The Dockerfile's instructions, comments dropped and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in lines if line.strip()]


def stages() -> list[list[Instruction]]:
    """The instructions, cut at each FROM; what stands before the first is left out."""
    parts: list[list[Instruction]] = []
    for instruction in instructions():
        if instruction.keyword == "FROM":
            parts.append([])
        if parts:
            parts[-1].append(instruction)
    return parts


def copies() -> list[tuple[list[str], str]]:
    """Sources and target of each COPY from the build context."""
    words = [i.text.split() for i in instructions() if i.keyword == "COPY" and "--from" not in i.text]
    return [(w[:-1], w[-1]) for w in words]


def only(keyword: str) -> str:
    """The last stage's one instruction of this kind."""
    (text,) = [i.text for i in stages()[-1] if i.keyword == keyword]
    return text


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in only("ENV").split())


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps the path out of the build context: the last line that matches decides."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    ignored = False
    for line in filter(None, lines):
        if line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        if pattern in {"*", path} or path.startswith(pattern + "/"):
            ignored = not line.startswith("!")
    return ignored


def test_everything_copied_exists_and_reaches_the_build_context() -> None:
    sources = [source for group, _ in copies() for source in group]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), f"COPY {source}: no such file"
        assert not is_ignored(source), f"COPY {source}: kept out by .dockerignore"
    assert is_ignored("tests/house/test_dockerfile.py")
    assert is_ignored(".git/config")


def test_everything_that_the_build_backend_packs_is_copied() -> None:
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    copied = [source for group, _ in copies() for source in group]
    for package in hatch["build"]["targets"]["wheel"]["packages"]:
        assert any(package.startswith(source + "/") for source in copied), package


def test_last_stage_runs_as_a_numbered_user_of_its_own() -> None:
    user = only("USER")
    assert int(user) > 0  # Kubernetes' runAsNonRoot cannot check a name
    created = [i.text for i in stages()[-1] if i.keyword == "RUN" and i.text.startswith("useradd")]
    assert created
    assert f"--uid {user} " in created[0]


def test_base_image_is_an_argument() -> None:
    before_from = instructions()[: [i.keyword for i in instructions()].index("FROM")]
    assert any(i.keyword == "ARG" and i.text.startswith("BASE=") for i in before_from)
    assert stages()[0][0].text.startswith("${BASE}")


class Answering(http.server.BaseHTTPRequestHandler):
    """/readyz with the status that the test has set."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def healthcheck(port: int) -> int:
    """Run the image's health check against this port; its exit status."""
    command = json.loads(only("HEALTHCHECK").partition("CMD ")[2])
    assert f", {8000}," in command[-1]
    words = [sys.executable if word == "python3" else word.replace("8000", str(port)) for word in command]
    return subprocess.run(words, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_healthcheck_follows_readyz(
    answering: int, monkeypatch: pytest.MonkeyPatch, status: int, healthy: bool
) -> None:
    monkeypatch.setattr(Answering, "status", status)
    assert (healthcheck(answering) == 0) is healthy


def test_healthcheck_fails_when_nobody_listens(answering: int) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert healthcheck(closed.getsockname()[1]) != 0


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the build stage would put into the image."""
    root = tmp_path_factory.mktemp("image")
    for sources, target in copies():
        place = root / target.lstrip("/")
        for source in sources:
            if (ROOT / source).is_dir():  # COPY takes a folder's contents
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)
    extras = next(i.text.partition("=")[2] for i in instructions() if i.text.startswith("EXTRAS="))
    steps = [i.text for i in stages()[1] if i.keyword == "RUN" and "apt-get" not in i.text]
    assert len(steps) == 2, "one step makes the environment, one fills it"
    for step in steps:
        rewritten = re.sub(r"/(opt|src)\b", lambda m: str(root / m[1]), step).replace(" --no-cache-dir", "")
        environment = os.environ | {"EXTRAS": extras}
        subprocess.run(
            ["bash", "-euc", rewritten.replace("python3 ", sys.executable + " ", 1)],
            env=environment,
            check=True,
        )
    return root


def variables(image: Path) -> dict[str, str]:
    """The environment that the image's processes see."""
    return environment() | {"PATH": f"{image}/opt/topfive/bin:/usr/bin:/bin"}


def run(image: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a program of the image to its end."""
    program = image / "opt/topfive/bin" / words[0]
    return subprocess.run(
        [program, *words[1:]], env=variables(image), text=True, capture_output=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_image_holds_the_server_and_no_torch(image: Path) -> None:
    installed = json.loads(run(image, "pip", "list", "--format", "json").stdout)
    names = {package["name"].lower() for package in installed}
    assert {"topfive", "fastapi", "onnxruntime-gpu"} <= names
    assert not names & {"torch", "onnxscript", "matplotlib", "pytest"}
    assert run(image, "topfive", "--help").returncode == 0
    train = run(image, "topfive", "train", "somewhere", "--out", "elsewhere")
    assert train.returncode == 1
    assert "pip install 'topfive[training]'" in train.stderr
    assert "Traceback" not in train.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_image_as_started_serves_models_and_is_healthy(image: Path, free_port: int) -> None:
    write_model(image / "models")
    words = [*json.loads(only("ENTRYPOINT")), *json.loads(only("CMD"))]
    words = [str(image / word.lstrip("/")) if word.startswith("/") else word for word in words]
    # Loopback is all that a test may open.
    ports = {"TOPFIVE_SERVE_HOST": "127.0.0.1", "TOPFIVE_SERVE_PORT": str(free_port)}
    process = subprocess.Popen(
        [image / "opt/topfive/bin" / words[0], *words[1:]], env=variables(image) | ports
    )
    try:
        deadline = time.monotonic() + 120
        while healthcheck(free_port) != 0:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the health check never passed"
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
