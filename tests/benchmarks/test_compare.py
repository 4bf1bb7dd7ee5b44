"""The comparison with other servers: its order, its arithmetic, its refusal of unlike answers, and one real run."""

import argparse
import email
import email.policy
import http.server
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks import compare
from benchmarks.compare import difference, plan, resume, summarize, table
from benchmarks.contestants import Answer, Arena, body, contestants, read_answer, write_triton_repository
from benchmarks.process import free_port, running
from benchmarks.serve import hot_model, wrk
from PIL import Image
from tests.server.onnx_models import make_spec, write_model

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk: apt-get install wrk")
JPEG = b"\xff\xd8\xff\x00\r\n\x80 no text"
LABELS: Answer = [
    {"label": "cat", "class": 3, "probability": 0.6},
    {"label": "dog", "class": 1, "probability": 0.2},
]


def turn(number: int, name: str, rate: float, failed: int = 0, others: float = 0.0) -> dict[str, Any]:
    load = {"1": {"rate": rate, "p99_ms": 10.0, "failed": failed}}
    return {"round": number, "name": name, "ready_s": 1.0, "load": load, "others": others}


# ---------------------------------------------------------------------- the order and the table


def test_every_round_has_everybody_once_and_begins_with_another() -> None:
    names = [f"server {n}" for n in range(13)]
    turns = plan(names, 4)
    rounds = [[name for number, name in turns if number == wanted] for wanted in range(4)]
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert len({each[0] for each in rounds}) == len({each[-1] for each in rounds}) == 4


def test_more_rounds_later_leave_those_before_as_they_were() -> None:
    assert plan(["a", "b", "c"], 5)[:6] == plan(["a", "b", "c"], 2)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine became half as fast between the rounds: the rates say nothing, the ratios do.
    turns = [turn(0, "topfive", 100), turn(0, "other", 80), turn(1, "other", 45), turn(1, "topfive", 50)]
    rows = summarize(turns, ["topfive", "other", "absent"], [1])
    assert rows.keys() == {"topfive", "other"}
    assert rows["other"][0].ratios == (0.8, 0.9)
    assert rows["topfive"][0].text() == "75"
    assert rows["other"][0].text() == "62 (0.85; 0.80-0.90)"


def test_a_turn_without_its_round_of_topfive_has_a_rate_and_no_ratio() -> None:
    rows = summarize([turn(0, "topfive", 100), turn(1, "other", 80)], ["topfive", "other"], [1])
    assert rows["other"][0].ratios == ()


def test_a_server_that_failed_requests_is_marked() -> None:
    rows = summarize([turn(0, "topfive", 100), turn(0, "other", 300, failed=2)], ["topfive", "other"], [1])
    text = table(rows, [1])
    assert text.splitlines()[0] == "| requests/s at | 1 | p99 ms |"
    assert "| other | 300 (3.00; 3.00-3.00) FAILED | 10 |" in text
    assert text.count("FAILED") == 1


def test_a_turn_that_others_disturbed_is_marked() -> None:
    turns = [turn(0, "topfive", 100, others=0.04), turn(0, "other", 30, others=0.4)]
    rows = summarize(turns, ["topfive", "other"], [1])
    assert rows["topfive"][0].text() == "100"
    assert rows["other"][0].text() == "30 (0.30; 0.30-0.30) DISTURBED"


def test_work_of_other_guests_is_what_is_stolen(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text(f"cpu  1 2 3 4 5 6 7 {3 * ticks} 8 9\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    assert compare.stolen_s(tmp_path / "stat") == 3


def test_the_ceiling_has_no_latency() -> None:
    rows = summarize(
        [{"round": 0, "name": "in process", "load": {"1": {"rate": 9.0, "p99_ms": math.nan, "failed": 0}}}],
        ["in process"],
        [1],
    )
    assert table(rows, [1]).endswith("| in process | 9 | - |")


# ---------------------------------------------------------------------- alike or not


def test_other_answers_make_the_comparison_void() -> None:
    assert difference([LABELS], [LABELS]) == ""
    near = [{**LABELS[0], "probability": 0.60001}, LABELS[1]]
    assert difference([LABELS], [near]) == ""
    far = [{**LABELS[0], "probability": 0.61}, LABELS[1]]
    assert "photograph 1 differ by 0.01" in difference([LABELS, LABELS], [LABELS, far])
    assert "'dog', and 'cat' for topfive" in difference([LABELS], [LABELS[::-1]])


def test_a_measurement_waits_for_what_the_one_before_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    durations = iter([1.0, 0.4, 0.03, 0.03, 0.03, 9.0])
    monkeypatch.setattr("benchmarks.compare.time.monotonic", lambda: clock[0])

    def request() -> None:
        clock[0] += next(durations)

    compare.settle(request)
    assert clock[0] == pytest.approx(1.46)
    assert list(durations) == [0.03, 9.0]


def test_a_server_that_never_settles_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("benchmarks.compare.time.monotonic", lambda: float(2 ** len(asked)))
    compare.settle(lambda: asked.append(1), most=7)
    assert len(asked) == 7


def test_a_file_of_another_comparison_is_refused(tmp_path: Path) -> None:
    head: dict[str, Any] = {
        "model_sha256": "a",
        "images": 2,
        "seconds": 4,
        "connections": [1],
        "contestants": {},
        "turns": [],
    }
    head["contestants"] = {"mosec": {"settings": "", "versions": ["mosec==1"]}}
    path = tmp_path / "compare.json"
    assert resume(path, head) is head
    path.write_text(json.dumps({**head, "turns": [turn(0, "mosec", 1.0)]}))
    assert len(resume(path, head)["turns"]) == 1
    with pytest.raises(SystemExit, match="its seconds is 4, not 5"):
        resume(path, {**head, "seconds": 5})
    with pytest.raises(SystemExit, match="mosec with other settings or versions"):
        resume(path, {**head, "contestants": {"mosec": {"settings": "", "versions": ["mosec==2"]}}})
    joined = {**head["contestants"], "Triton": {"settings": "", "versions": []}}
    assert resume(path, {**head, "contestants": joined})["contestants"].keys() == {"mosec", "Triton"}


# ---------------------------------------------------------------------- requests and answers


def test_every_body_carries_the_image() -> None:
    assert body("image", JPEG) == JPEG
    tensor = json.loads(body("v2", JPEG))["inputs"][0]
    assert (tensor["shape"], tensor["datatype"]) == ([1], "BYTES")
    header = next(h for h in contestants()["BentoML"].headers if h.startswith("Content-Type"))
    form = email.message_from_bytes(
        header.encode() + b"\r\n\r\n" + body("multipart", JPEG), policy=email.policy.HTTP
    )
    (part,) = form.iter_parts()
    assert part.get_payload(decode=True) == JPEG
    assert part.get_filename()


def test_answers_are_read_out_of_every_frame() -> None:
    answer = json.dumps({"top": LABELS}).encode()
    everyone = contestants()
    assert read_answer(everyone["mosec"], answer, None) == LABELS
    assert read_answer(everyone["BentoML"], b"[" + answer + b"]", None) == LABELS
    framed = b'{"outputs":[]}' + len(answer).to_bytes(4, "little") + answer
    assert read_answer(everyone["Triton"], framed, "14") == LABELS
    v2 = json.dumps({"outputs": [{"data": [answer.decode()]}]}).encode()
    assert read_answer(everyone["MLServer"], v2, None) == LABELS
    ours = json.dumps({"images": [{"top": LABELS}]}).encode()
    assert read_answer(everyone["topfive"], ours, None) == LABELS


def test_all_share_the_cores_alike() -> None:
    for contestant in contestants().values():
        assert contestant.workers in {1, contestants()["mosec, a worker per core"].workers}
        assert contestant.settings
    assert contestants()["Triton"].headers == contestants()["Triton, an instance per core"].headers


def test_the_repository_of_triton_has_as_many_instances_as_workers(tmp_path: Path) -> None:
    write_triton_repository(tmp_path / "models", 2)
    assert "count: 2" in (tmp_path / "models" / "classify" / "config.pbtxt").read_text()
    assert "class TritonPythonModel" in (tmp_path / "models" / "classify" / "1" / "model.py").read_text()


@pytest.mark.parametrize(
    "name", ["bentoml", "litserve", "mlserver", "mosec", "ray", "triton_python_backend_utils"]
)
def test_the_service_is_importable_where_its_library_is(name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is in an environment of its own (make compare-env)")
    module = {"ray": "rayserve", "triton_python_backend_utils": "triton"}.get(name, name)
    environment = {**os.environ, "COMPARE_WORKERS": "1", "COMPARE_THREADS": "1", "COMPARE_PORT": "1"}
    subprocess.run(
        [sys.executable, "-c", f"import benchmarks.servers.with_{module}"], check=True, env=environment
    )


def test_every_service_has_requirements_and_its_own_file() -> None:
    servers = Path(compare.__file__).with_name("servers")
    used = {c.environment for c in contestants().values() if c.environment}
    assert {path.stem for path in (servers / "requirements").iterdir()} == used
    modules = {c.module for c in contestants().values() if c.module} | {"with_triton"}
    assert {path.stem for path in servers.glob("with_*.py")} == modules


def test_all_have_the_same_runtime_and_decoder() -> None:
    requirements = Path(compare.__file__).with_name("servers") / "requirements"
    pins = {
        line
        for path in requirements.iterdir()
        for line in path.read_text().splitlines()
        if line.startswith(("onnxruntime", "pillow"))
    }
    assert len(pins) == 2, pins


# ---------------------------------------------------------------------- processes


def test_a_server_that_does_not_start_ends_the_run_with_its_last_words() -> None:
    with (
        pytest.raises(SystemExit, match="out of luck"),
        running([sys.executable, "-c", "raise SystemExit('out of luck')"], "http://127.0.0.1:9", ready="/"),
    ):
        pass


def test_workers_that_outlive_their_server_are_ended_with_it(tmp_path: Path) -> None:
    port = free_port()
    program = f"""
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
os.environ["X"] == "given" or sys.exit("no environment")
http.server.HTTPServer(("127.0.0.1", {port}), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
    with running(
        [sys.executable, "-c", program], f"http://127.0.0.1:{port}", ready="/", environment={"X": "given"}
    ):
        child = int((tmp_path / "child").read_text())
        os.kill(child, 0)
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child lives")


class Recorder(http.server.BaseHTTPRequestHandler):
    """Keeps what it was sent."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, bytes]]

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.headers["Content-Type"], self.headers["X-Thing"], data))
        status = 500 if data == b"bad" else 200
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@needs_wrk
def test_wrk_sends_every_file_with_the_headers_and_counts_what_failed(tmp_path: Path) -> None:
    for name in ("one", "two", "bad"):
        (tmp_path / name).write_bytes(name.encode())
    seen: list[tuple[str, str, bytes]] = []
    handler = type("Handler", (Recorder,), {"seen": seen})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        result = wrk(url, tmp_path, 2, 1, ("Content-Type: text/plain", "X-Thing: a: b"))
        server.shutdown()
        thread.join()
    assert {data for _, _, data in seen} == {b"one", b"two", b"bad"}
    assert {(kind, thing) for kind, thing, _ in seen} == {("text/plain", "a: b")}
    assert result["rate"] > 0
    assert result["bad_status"] > 0


# ---------------------------------------------------------------------- the whole


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, color in enumerate(((250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9), (200, 200, 9))):
        Image.new("RGB", (64, 48), color).save(folder / f"{number}.jpg")
    return folder


@pytest.fixture
def environments(tmp_path: Path) -> Path:
    """FastAPI is here already: this environment serves as its own."""
    folder = tmp_path / "environments"
    folder.mkdir()
    (folder / "fastapi").symlink_to(sys.prefix, target_is_directory=True)
    return folder


def test_the_service_on_fastapi_answers_as_topfive_does(
    tmp_path: Path, photographs: Path, environments: Path
) -> None:
    write_model(tmp_path / "models")
    model = hot_model(tmp_path / "models", "cpu", "fp32")
    arena = Arena(model=model, models=tmp_path / "models", own=None, environments=environments)
    everyone = contestants()
    assert not arena.has(everyone["mosec"])
    images = [path.read_bytes() for path in sorted(photographs.iterdir())]
    answers = []
    for name in ("topfive", "FastAPI"):
        with arena.start(everyone[name]) as served:
            answers.append([compare.ask(served.url, everyone[name], image) for image in images])
    assert difference(*answers) == ""
    assert len({answer[0]["label"] for answer in answers[0]}) > 1


@needs_wrk
def test_a_run_goes_on_where_it_was(
    tmp_path: Path,
    photographs: Path,
    environments: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A short side of 256 and a crop of 227: what the ceiling's engine and the decoders see in earnest.
    write_model(tmp_path / "models", spec=make_spec(crop=227, short_side=256))
    report = tmp_path / "compare.json"
    arguments = [
        *("compare.py", str(tmp_path / "models"), str(photographs), "--environments", str(environments)),
        *("--only", "topfive", "FastAPI", "mosec", "--connections", "1", "2", "--seconds", "1"),
        *("--json", str(report)),
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--rounds", "1", "--for-s", "0.001"])
    compare.main()
    assert json.loads(report.read_text())["turns"] == [] if report.exists() else True
    monkeypatch.setattr(sys, "argv", [*arguments, "--rounds", "1"])
    compare.main()
    said = capsys.readouterr()
    assert "left out: mosec" in said.err
    turns = json.loads(report.read_text())["turns"]
    assert [t["name"] for t in turns] == ["in process", "topfive", "FastAPI"]
    assert all(load["rate"] > 0 and not load["failed"] for t in turns for load in t["load"].values())
    assert all(f"| {t['name']} | " in said.out for t in turns)
    monkeypatch.setattr(sys, "argv", [*arguments, "--rounds", "1"])
    compare.main()
    assert len(json.loads(report.read_text())["turns"]) == len(turns)


def test_unlike_answers_end_the_run(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environments: Path
) -> None:
    write_model(tmp_path / "models")
    options = argparse.Namespace(
        models=tmp_path / "models", images=photographs, own=None, environments=environments,
        only=["topfive", "FastAPI"], connections=[1], seconds=1,
    )  # fmt: skip
    comparison = compare.Comparison(options, tmp_path)
    wrong = [[{"label": "class 99", "class": 99, "probability": 1.0}]] * compare.CHECKED
    monkeypatch.setattr(compare, "wrk", lambda *_: pytest.fail("it was loaded all the same"))
    with pytest.raises(SystemExit, match="FastAPI does not answer as topfive does"):
        comparison.turn(0, "FastAPI", wrong)
