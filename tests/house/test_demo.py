"""`make demo`: its bookkeeping against a `topfive` that only notes what it was asked; all of it, for real, at night."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, in an empty folder, with a `topfive` that appends its arguments to `calls` and makes demo/*."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    fake = tmp_path / "topfive"
    fake.write_text(
        '#!/bin/sh\necho "$@" >> calls\nmkdir -p demo/images demo/run demo/models\ntest ! -e fail-$1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(module, "TOPFIVE", fake)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    return module


def calls() -> list[str]:
    """First words of the commands that ran since the last call, with `--resume` kept."""
    path = Path("calls")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.split()[0] + (" --resume" if "--resume" in line else "") for line in lines]


def make_all(demo: ModuleType) -> None:
    for step in demo.STEPS:
        demo.make(step)


def test_what_is_done_is_not_done_again(demo: ModuleType) -> None:
    make_all(demo)
    assert calls() == ["demo-images", "train", "export"]
    make_all(demo)
    assert calls() == []


def test_interrupted_training_is_resumed_and_an_interrupted_export_begun_anew(demo: ModuleType) -> None:
    Path("fail-train").touch()
    with pytest.raises(demo.DemoError, match=r"topfive train.*status 1"):
        make_all(demo)
    assert calls() == ["demo-images", "train"]
    Path("fail-train").unlink()
    Path("fail-export").touch()
    with pytest.raises(demo.DemoError, match="topfive export"):
        make_all(demo)
    assert calls() == ["train --resume", "export"]
    Path("demo/models/rubbish").touch()
    Path("fail-export").unlink()
    make_all(demo)
    assert calls() == ["export"]
    assert not Path("demo/models/rubbish").exists()


def test_a_changed_step_is_done_again_with_all_that_follow(demo: ModuleType) -> None:
    make_all(demo)
    calls()
    state = json.loads(demo.STATE.read_text())
    state["train"]["arguments"].append("--epochs=1")
    demo.STATE.write_text(json.dumps(state))
    make_all(demo)
    assert calls() == ["train", "export"]


def test_a_missing_result_and_a_damaged_note_are_made_anew(demo: ModuleType) -> None:
    make_all(demo)
    calls()
    Path("demo/models").rmdir()
    make_all(demo)
    assert calls() == ["export"]
    demo.STATE.write_text("{")
    make_all(demo)
    assert calls() == ["demo-images", "train", "export"]


def test_port_in_use_is_passed_over(demo: ModuleType) -> None:
    first = demo.free_port()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the demo's server
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert demo.free_port() > first


def test_server_that_does_not_start_is_explained(demo: ModuleType) -> None:
    demo.TOPFIVE.write_text('#!/bin/sh\necho "no models here"\nexit 3\n')
    with pytest.raises(demo.DemoError, match=r"status 3:\nno models here"), demo.server():
        pass


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_end_it_takes_its_server_with_it(demo: ModuleType, signal_: signal.Signals) -> None:
    """`demo` only for the folder; the script runs as a process, with a server that says that it is ready."""
    server = Path("server.py")
    server.write_text(
        "import http.server, os, sys\n"
        "handler = type('Ready', (http.server.BaseHTTPRequestHandler,), {'do_GET': lambda self: self.send_error(200)})\n"
        "print(os.getpid(), flush=True)\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[-1])), handler).serve_forever()\n"
    )
    demo.TOPFIVE.write_text(f'#!/bin/sh\nexec {sys.executable} server.py "$@"\n')
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import demo; from pathlib import Path\n"
        "demo.ROOT, demo.STEPS, demo.TOPFIVE = Path.cwd(), (), Path('topfive').absolute()\n"
        "demo.say_accuracy = lambda: None\n"
        "demo.ask = lambda address: (print('asked', flush=True), time.sleep(60))\n"
        "sys.exit(demo.main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert "asked\n" in iter(process.stdout.readline, "")
        process.send_signal(signal_)
        status = process.wait(timeout=30)
    pid = int(demo.SERVER_LOG.read_text().split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    assert status == 128 + signal_


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_whole_demo_in_a_fresh_clone(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    result = subprocess.run(
        [sys.executable, tmp_path / "clone" / "scripts" / "demo.py"],
        env=os.environ | {"DEMO_ONCE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = json.loads((tmp_path / "clone/demo/run/model.json").read_text())["metrics"]
    assert metrics["top1"] > 0.8
    answer = next(json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"'))
    assert answer["images"][0]["top"][0]["label"] == "star"
