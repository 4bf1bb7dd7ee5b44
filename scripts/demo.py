"""`make demo`: ten kinds of drawn picture -> trained AlexNet -> verified ONNX -> HTTP server -> five labels.

Runs the commands that a user would type and prints each. What an earlier run finished is kept: a step is done again
only when its command or an earlier step has changed, and an interrupted training goes on where it was.

DEMO_ONCE=1 in the environment, or a standard input that is no terminal: stop after the first answer.
"""

import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
DEMO: Final = Path("demo")
STATE: Final = DEMO / "steps.json"
SERVER_LOG: Final = DEMO / "server.log"
SAMPLE: Final = DEMO / "images/val/star/star_00000.jpg"
TOPFIVE: Final = Path(sys.executable).with_name("topfive")
READY_TIMEOUT_S: Final = 120


class DemoError(Exception):
    """Why the demo cannot go on, as a sentence for the person who started it."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command, and the folder that it makes."""

    name: str
    title: str
    output: Path
    arguments: tuple[str, ...]
    """The words after `topfive`."""
    resume: tuple[str, ...] = ()
    """Added when an earlier run of the same command was interrupted; without, it begins anew."""


STEPS: Final = (
    Step(
        name="images",
        title="Drawing ten kinds of picture: 2,000 to train on, 400 to check with",
        output=DEMO / "images",
        arguments=("demo-images", "demo/images", "--per-class", "200"),
    ),
    Step(
        name="train",
        title="Training AlexNet at a quarter of its width, on all cores, as two data-parallel processes",
        output=DEMO / "run",
        arguments=(
            *("train", "demo/images", "--out", "demo/run", "--recipe", "modern", "--processes", "2"),
            *("--width", "0.25", "--epochs", "12", "--batch-size", "32"),
            *("--dropout", "0.2", "--label-smoothing", "0", "--warmup-epochs", "1"),
        ),
        resume=("--resume",),
    ),
    Step(
        name="export",
        title="Exporting to ONNX, and checking that it answers as the trained network does",
        output=DEMO / "models",
        arguments=(
            "export",
            "demo/run",
            "--out",
            "demo/models",
            "--name",
            "demo",
            "--images",
            "demo/images/val",
        ),
    ),
)


def main() -> int:
    """Run the demo; returns the exit status."""
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does: on the way out what was started is ended
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    os.chdir(ROOT)
    DEMO.mkdir(exist_ok=True)
    once = bool(os.environ.get("DEMO_ONCE")) or not sys.stdin.isatty()
    started = time.monotonic()
    try:
        for step in STEPS:
            make(step)
        say_accuracy()
        say("Serving")
        with server() as (process, address):
            ask(address)
            say(f"From pictures to answers in {time.monotonic() - started:.0f} s.")
            if not once:
                print(f"The server is at http://{address} (in a browser, too) until you press Ctrl-C.")
                wait_for_ctrl_c(process)
    except DemoError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped; `make demo` goes on from here.", file=sys.stderr)
        return 130
    return 0


def say(text: str) -> None:
    """Print a headline."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def make(step: Step) -> None:
    """Run the step's command unless its result is there."""
    state = read_state()
    before = state.get(step.name, {})
    same = before.get("arguments") == list(step.arguments) and step.output.exists()
    if same and before.get("finished"):
        print(f"{step.output} is there from an earlier run.")
        return
    say(step.title)
    arguments = step.arguments
    if same and step.resume:
        arguments += step.resume
    else:
        shutil.rmtree(step.output, ignore_errors=True)
    # What later steps made of an earlier result is worth nothing now.
    names = [s.name for s in STEPS]
    state = {name: entry for name, entry in state.items() if name in names[: names.index(step.name)]}
    write_state(state | {step.name: {"arguments": step.arguments, "finished": False}})
    run(*arguments)
    write_state(state | {step.name: {"arguments": step.arguments, "finished": True}})


def read_state() -> dict[str, dict[str, object]]:
    """What earlier runs did: by step, its arguments and whether it finished."""
    try:
        state = json.loads(STATE.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(state: dict[str, dict[str, object]]) -> None:
    """Keep the state for the next run."""
    STATE.write_text(json.dumps(state, indent=1), encoding="utf-8")


def run(*arguments: str) -> None:
    """Run one topfive command in the foreground."""
    print(f"$ topfive {shlex.join(arguments)}", flush=True)
    process = subprocess.Popen([TOPFIVE, *arguments])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal's Ctrl-C went to the command as well: let it save
        raise
    except SystemExit:
        process.terminate()
        process.wait()
        raise
    if status != 0:
        raise DemoError(f"`topfive {arguments[0]}` ended with status {status}; the reason is above.")


def say_accuracy() -> None:
    """How good the network is on pictures that it was not trained on."""
    metrics = json.loads(Path("demo/run/model.json").read_text(encoding="utf-8"))["metrics"]
    say(
        f"The right label came first for {metrics['top1']:.1%} of the pictures held out, "
        f"among five for {metrics['top5']:.1%} (chance: 10 % and 50 %)."
    )


@contextmanager
def server() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server of the exported models; gives its process and its host:port once it is ready."""
    port = free_port()
    arguments = ["serve", "demo/models", "--host", "127.0.0.1", "--port", str(port)]
    print(f"$ topfive {shlex.join(arguments)}   (its log: {SERVER_LOG})", flush=True)
    with SERVER_LOG.open("wb") as log:
        # A session of its own: Ctrl-C is for this process, which then stops the server.
        process = subprocess.Popen([TOPFIVE, *arguments], stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_ready(process, port)
        yield process, f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """The first free port from 8000."""
    for port in range(8000, 8100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise DemoError("none of the ports 8000 to 8099 is free.")


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when /readyz answers 200."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise server_ended(process)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except (OSError, http.client.HTTPException):
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.1)
    raise DemoError(f"the server was not ready within {READY_TIMEOUT_S} s; its log is {SERVER_LOG}.")


def server_ended(process: subprocess.Popen[bytes]) -> DemoError:
    """The error that says how the server ended, with the end of its log."""
    tail = "\n".join(SERVER_LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
    return DemoError(f"the server ended with status {process.returncode}:\n{tail}")


def ask(address: str) -> None:
    """Send one held-out picture with curl, and print what came back."""
    words = ["-T", str(SAMPLE), f"http://{address}/v1/classify"]
    say("Asking for the five labels of a picture that it has never seen")
    print(f"$ curl {shlex.join(words)}", flush=True)
    answer = subprocess.run(
        ["curl", "--silent", "--show-error", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if answer.returncode != 0:
        raise DemoError(f"curl ended with status {answer.returncode}; the server's log is {SERVER_LOG}.")
    print(answer.stdout.rstrip())
    images = json.loads(answer.stdout).get("images")
    if not images or "top" not in images[0]:
        raise DemoError("the server refused the picture; its answer is above.")
    print(flush=True)
    run("classify", str(SAMPLE), "--url", f"http://{address}")


def wait_for_ctrl_c(process: subprocess.Popen[bytes]) -> None:
    """Until Ctrl-C, which is how this ends well; a server that ends by itself is an error."""
    try:
        process.wait()
    except KeyboardInterrupt:
        print("\nThe server has stopped; `make demo` starts it again in seconds.")
    else:
        raise server_ended(process)


if __name__ == "__main__":
    sys.exit(main())
