"""`topfive score`: a folder of images in, a table with one row per file out."""

import contextlib
import signal
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final, Literal

from cyclopts import Parameter
from rich.console import Console

from topfive.scoring import (
    Bar,
    InterruptedJobError,
    JobConfig,
    Lines,
    LocalScorer,
    RefusedError,
    RemoteScorer,
    Reporter,
    Scorer,
    ServerConfig,
    Source,
    Summary,
    load_classifier,
    patient_client,
    run_job,
)

EXIT_OK: Final = 0
EXIT_FAILED_ROWS: Final = 5
"""The results are complete, and at least one row is of a file that could not be classified."""


def score(
    folder: str,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    model: Path | None = None,
    model_name: str | None = None,
    model_version: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    decode_threads: int | None = None,
    engine_threads: int | None = None,
    url: str | None = None,
    server: Annotated[ServerConfig | None, Parameter(name="*")] = None,
    job: Annotated[JobConfig | None, Parameter(name="*")] = None,
) -> int:
    """Label every image of a folder into a JSON lines, CSV or Parquet file: one row per file, in a stable order.

    Interrupted or killed, the same command goes on where it stopped. Exit status: 0 every file was classified, 5 the
    results are complete but some rows are of files that failed, 2 refused, 3 stopped because the server stayed
    unreachable, 4 stopped for another reason (disk full, too many failures), 130 interrupted; after 3, 4 and 130 the
    same command goes on.

    Args:
        folder: a local folder, searched to any depth, or a URL that fsspec can open (s3://bucket/photos).
        output: the results; the ending says the format: .jsonl, .csv or .parquet.
        model: classify in this process, with this model repository (as `topfive export` writes it); without it, a
            server classifies.
        model_name: the model of the repository or the server; by default its only one, or its default.
        model_version: the version of the model; by default the newest.
        device: what computes, in this process.
        decode_threads: threads that read and decode; by default one for each processor.
        engine_threads: threads of the engine on a CPU; by default its own choice.
        url: address of the server; by default `TOPFIVE_URL` or http://127.0.0.1:8000.
        server: how the server is asked.
        job: what to score, and when to save and to stop.
    """
    if model is not None and url is not None:
        raise RefusedError("--model (in this process) and --url (through a server) exclude each other")
    config = job or JobConfig()
    stop = threading.Event()

    def open_scorer(source: Source) -> Scorer:
        if model is None:
            return _open_remote(
                url,
                source,
                top_k=config.top_k,
                model=model_name,
                version=model_version,
                config=server or ServerConfig(),
                stop=stop,
                note=reporter.note,
            )
        classifier = load_classifier(
            model, model=model_name, version=model_version, device=device, threads=engine_threads
        )
        return LocalScorer(
            classifier,
            source,
            top_k=config.top_k,
            max_pixels=config.max_pixels,
            decode_threads=decode_threads,
        )

    reporter: Reporter = Bar(Console(stderr=True)) if sys.stderr.isatty() else Lines(sys.stderr)
    with _signals_set(stop, reporter) as received:
        try:
            summary = run_job(folder, output, open_scorer, config=config, reporter=reporter, stop=stop)
        except InterruptedJobError as error:
            reporter.note(f"topfive: {error}")
            return 128 + received[0]
    _print_summary(summary)
    return EXIT_FAILED_ROWS if summary.failed else EXIT_OK


def _open_remote(url: str | None, source: Source, **options: Any) -> RemoteScorer:
    client = patient_client(url)
    try:
        return RemoteScorer(client, source, **options)
    except BaseException:
        client.close()
        raise


@contextlib.contextmanager
def _signals_set(stop: threading.Event, reporter: Reporter) -> Generator[list[int]]:
    """SIGINT and SIGTERM set `stop`, the first time; a second one ends the process, which loses nothing saved."""
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        stop.set()
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        reporter.note("Finishing the batches in flight and saving; press Ctrl-C again to stop at once.")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _print_summary(summary: Summary) -> None:
    failed = ", ".join(f"{count:,} {status}" for status, count in summary.failed_by_status.items())
    print(  # noqa: T201
        f"{summary.output}: {summary.files:,} rows, {summary.failed:,} failed{f' ({failed})' if failed else ''}"
        f"{f', {summary.duplicates:,} duplicates' if summary.duplicates else ''}\n"
        f"{summary.model} version {summary.version} in {summary.runs_on}: {summary.images_per_second:,.1f} images/s "
        f"over {summary.seconds:,.1f} s"
    )
