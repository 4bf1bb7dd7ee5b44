"""One scoring job: list, score, save as it goes, and publish the results when every file has its row."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

from topfive._folders import IMAGE_SUFFIXES
from topfive._version import __version__
from topfive.preprocessing import DEFAULT_MAX_PIXELS
from topfive.scoring._answers import Answers
from topfive.scoring._errors import InterruptedJobError, RefusedError, StoppedError
from topfive.scoring._formats import check_format, write_table
from topfive.scoring._progress import Reporter, Silent
from topfive.scoring._rows import ENGINE_FAILED, OK, Outcome, Row, make_row, outcome_of, published
from topfive.scoring._scorer import Scorer
from topfive.scoring._sources import Source, open_source
from topfive.scoring._state import JobRecord, JobState

_MAX_UNSAVED_ROWS: Final = 20_000
"""Rows are saved when there are this many, however little time has passed."""
_FAILURE_BASE: Final = 100
"""The failure rate is taken over at least so many files, lest the first bad one end the job."""


_MAX_ENGINE_FAILURES: Final = 32
"""Files in a row on which the engine may fail before it counts as broken. Until one is classified again, their rows
are not saved: if it is the engine's fault, a resumed job gives them another chance."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What to score, and when to save and to stop."""

    top_k: int = 5
    """Labels per row, 1 to 5; fewer where the model has fewer classes."""
    all_files: bool = False
    """Give every file a row, not only those whose name ends as an image's does."""
    dedupe: bool = False
    """Compute images of the same bytes once; every file still gets its row."""
    overwrite: bool = False
    """Discard existing results, and an unfinished job, and start anew."""
    max_failure_rate: float = 1.0
    """Stop when more than this share of the files fails, 0 to 1; taken over at least 100 files. 1 never stops."""
    max_bytes: int = 100_000_000
    """A larger file is not read, in bytes; its row says so."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """An image of more pixels is not decoded (engine in process; a server has a limit of its own)."""
    save_every_s: float = 10.0
    """Seconds between saves of finished rows: what a crash can cost. 0 saves after every batch."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        checks = (
            (1 <= self.top_k <= 5, "top_k", self.top_k, "between 1 and 5"),
            (0 <= self.max_failure_rate <= 1, "max_failure_rate", self.max_failure_rate, "between 0 and 1"),
            (self.max_bytes >= 1, "max_bytes", self.max_bytes, "at least 1"),
            (self.max_pixels >= 1, "max_pixels", self.max_pixels, "at least 1"),
            (self.save_every_s >= 0, "save_every_s", self.save_every_s, "at least 0 seconds"),
        )
        for ok, name, value, allowed in checks:
            if not ok:
                raise ValueError(f"{name} is {value}; it must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished job came to; also written to `<output>.stats.json`."""

    output: str
    """The results."""
    folder: str
    """What was scored."""
    model: str
    """Name of the model."""
    version: str
    """Version of the model."""
    fingerprint: str
    """Fingerprint of the model."""
    runs_on: str
    """What computed: this process, or the server's URL."""
    files: int
    """Number of rows."""
    ok: int
    """Files that were classified."""
    failed: int
    """Files that were not."""
    duplicates: int
    """Files that got the answer of another one with the same bytes."""
    failed_by_status: dict[str, int]
    """How many failed with each status, most frequent first."""
    resumed_at: int
    """Rows that earlier runs of the job had saved."""
    seconds: float
    """Duration of this run's scoring, without listing and publishing."""
    images_per_second: float
    """Files scored by this run, by its seconds."""
    topfive_version: str = __version__
    """The program that wrote it."""


def run_job(
    folder: str,
    output: Path,
    open_scorer: Callable[[Source], Scorer],
    *,
    config: JobConfig | None = None,
    reporter: Reporter | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Score a folder into a file, going on where an earlier run of the same job stopped.

    Args:
        folder: a local folder, or a URL that fsspec can open.
        output: the results, `.jsonl`, `.csv` or `.parquet`; the job's state is in `<output>.parts` until it is complete.
        open_scorer: loads the engine or connects to the server; called after the cheap refusals.
        config: what to score, and when to save and to stop.
        reporter: is told of the progress.
        stop: set it (from a signal handler, say) to save and stop after the batches in flight.

    Raises:
        RefusedError: nothing was scored, and why.
        StoppedError: stopped before the end; what was scored is saved. `InterruptedJobError` when by `stop`.
    """
    check_format(output)
    config = config or JobConfig()
    reporter = reporter or Silent()
    stop = stop or threading.Event()
    with JobState.claim(output, overwrite=config.overwrite) as state:
        source = open_source(folder, skip={output, state.folder}, max_bytes=config.max_bytes)
        scorer = open_scorer(source)
        try:
            record = _resume_or_begin(config, state, source, scorer, reporter)
            with Answers(state.answers) if config.dedupe else contextlib.nullcontext() as answers:
                run = _Run(
                    config=config,
                    record=record,
                    state=state,
                    scorer=scorer,
                    answers=answers,
                    reporter=reporter,
                    stop=stop,
                )
                try:
                    run.score()
                finally:
                    reporter.end()
        finally:
            scorer.close()
        return run.publish()


def _resume_or_begin(
    config: JobConfig, state: JobState, source: Source, scorer: Scorer, reporter: Reporter
) -> JobRecord:
    identity = scorer.identity
    wanted = JobRecord(
        folder=source.location,
        all_files=config.all_files,
        top_k=min(config.top_k, identity.classes),
        model=identity.model,
        version=identity.version,
        fingerprint=identity.fingerprint,
        dedupe=config.dedupe,
    )
    if state.begun:
        record = state.record()
        if differences := record.differences(wanted):
            raise RefusedError(
                f"{state.output} was begun otherwise ({'; '.join(differences)}), and one file of results must not mix "
                "the two; repeat the earlier command to go on with it, or add --overwrite to start anew"
            )
        reporter.note("Going on with the job that was begun; files added since it began are not in it.")
        return record
    reporter.note(f"Listing {source.location}")
    files, digest = state.write_listing(source.list(all_files=config.all_files))
    if not files:
        what = (
            "files"
            if config.all_files
            else f"images ({', '.join(IMAGE_SUFFIXES)}; --all-files takes any name)"
        )
        raise RefusedError(f"there are no {what} in {source.location}")
    record = replace(wanted, files=files, listing_sha256=digest)
    state.begin(record)
    return record


class _Run:
    """One process's work on a job."""

    def __init__(
        self,
        *,
        config: JobConfig,
        record: JobRecord,
        state: JobState,
        scorer: Scorer,
        answers: Answers | None,
        reporter: Reporter,
        stop: threading.Event,
    ) -> None:
        self._config = config
        self._record = record
        self._state = state
        self._scorer = scorer
        self._reporter = reporter
        self._stop = stop
        self._answers = answers
        self._saved = self._failures = 0
        for row in state.rows():
            self._saved += 1
            self._failures += row["status"] != OK
            if answers is not None:
                answers.add(outcome_of(row))
        self._resumed_at = self._saved
        self._unsaved: list[Row] = []
        self._engine_failures = 0
        self._seconds = 0.0

    def score(self) -> None:
        """Score and save what is missing."""
        self._reporter.begin(total=self._record.files, done=self._saved, failures=self._failures)
        started_s = time.monotonic()
        try:
            self._score_missing()
            self._save(self._unsaved)
        except StoppedError as error:
            with contextlib.suppress(StoppedError):  # the disk may be what stopped it
                self._save()
            raise type(error)(
                f"{error}. {self._saved:,} of {self._record.files:,} files are scored and saved in "
                f"{self._state.folder}; the same command goes on from there"
            ) from error
        finally:
            self._seconds = time.monotonic() - started_s

    def _score_missing(self) -> None:
        size = self._scorer.chunk_files
        # Chunks begin at multiples of their size wherever the job goes on, so the engine sees the same batches.
        chunks = _chunked(self._state.listing(self._saved), size, first=size - self._saved % size)
        paths = self._state.listing(self._saved)
        saved_s = time.monotonic()
        with contextlib.closing(self._scorer.score(self._until_stopped(chunks), self._answers)) as scored:
            for outcomes in scored:
                self._take(paths, outcomes)
                due = time.monotonic() - saved_s >= self._config.save_every_s
                if due or len(self._unsaved) >= _MAX_UNSAVED_ROWS:
                    self._save()
                    saved_s = time.monotonic()
                self._check_failures(outcomes)
        if self._stop.is_set() and self._saved + len(self._unsaved) < self._record.files:
            raise InterruptedJobError("stopped as asked")

    def _take(self, paths: Iterator[str], outcomes: list[Outcome]) -> None:
        record = self._record
        for outcome in outcomes:
            row = make_row(
                next(paths), outcome, model=record.model, version=record.version, top_k=record.top_k
            )
            self._unsaved.append(row)
            if outcome.ok and not outcome.duplicate:
                self._engine_failures = 0
            elif outcome.status == ENGINE_FAILED:
                self._engine_failures += 1
        failures = sum(not outcome.ok for outcome in outcomes)
        self._failures += failures
        self._reporter.advance(files=len(outcomes), failures=failures)

    def _until_stopped(self, chunks: Iterable[list[str]]) -> Iterator[list[str]]:
        for chunk in chunks:
            if self._stop.is_set():
                return
            yield chunk

    def _check_failures(self, outcomes: list[Outcome]) -> None:
        if self._engine_failures >= _MAX_ENGINE_FAILURES:
            last = next(outcome for outcome in reversed(outcomes) if outcome.status == ENGINE_FAILED)
            raise StoppedError(f"{self._engine_failures} files in a row failed; {last.error}")
        seen = self._saved + len(self._unsaved)
        limit = self._config.max_failure_rate
        if self._failures > limit * max(seen, min(_FAILURE_BASE, self._record.files)):
            raise StoppedError(
                f"{self._failures:,} of {seen:,} files failed, more than --max-failure-rate {limit:g} allows"
            )

    def _save(self, rows: list[Row] | None = None) -> None:
        """Save `rows`, the first of those that are unsaved; all but a run of engine failures at their end by default."""
        if rows is None:
            rows = self._unsaved[: _before_engine_failures(self._unsaved)]
            if not rows and len(self._unsaved) >= _MAX_UNSAVED_ROWS:
                rows = (
                    self._unsaved
                )  # nothing to compute since the engine failed: they must not gather in memory
        if rows:
            self._state.save_part(self._saved, rows)
            self._saved += len(rows)
            self._unsaved = self._unsaved[len(rows) :]

    def publish(self) -> Summary:
        """Put the results in their place, write the statistics, and forget the job."""
        state, output = self._state, self._state.output
        counts: Counter[str] = Counter()
        duplicates = 0

        def rows() -> Iterator[Row]:
            nonlocal duplicates
            for row in state.rows():
                counts[str(row["status"])] += 1
                duplicates += bool(row.get("duplicate"))
                yield published(row)

        temporary = state.folder / f"results{output.suffix}"
        try:
            write_table(temporary, rows(), suffix=output.suffix, top_k=self._record.top_k)
            if counts.total() != self._record.files:
                raise RefusedError(
                    f"{state.folder} holds {counts.total()} rows for {self._record.files} files"
                )
            state.publish(temporary, output)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoppedError(
                f"{state.disk_error(error)}. All {self._record.files:,} files are scored; the same command, once "
                f"there is room, writes {output}"
            ) from error
        summary = self._summary(counts, duplicates)
        with state.saving("stats.json") as file:
            file.write(json.dumps(asdict(summary), indent=2, ensure_ascii=False).encode() + b"\n")
        state.publish(state.folder / "stats.json", output.with_name(f"{output.name}.stats.json"))
        state.clear()
        return summary

    def _summary(self, counts: Counter[str], duplicates: int) -> Summary:
        scored = self._record.files - self._resumed_at
        return Summary(
            output=str(self._state.output),
            folder=self._record.folder,
            model=self._record.model,
            version=self._record.version,
            fingerprint=self._record.fingerprint,
            runs_on=self._scorer.identity.runs_on,
            files=self._record.files,
            ok=counts[OK],
            failed=counts.total() - counts[OK],
            duplicates=duplicates,
            failed_by_status={status: n for status, n in counts.most_common() if status != OK},
            resumed_at=self._resumed_at,
            seconds=round(self._seconds, 3),
            images_per_second=round(scored / self._seconds, 1) if scored else 0.0,
        )


def _before_engine_failures(rows: list[Row]) -> int:
    """Number of rows up to and including the last that was computed, or all if no later one is the engine's fault."""
    end = len(rows)
    for index in range(len(rows) - 1, -1, -1):
        if rows[index]["status"] == OK and not rows[index].get("duplicate"):
            return end
        if rows[index]["status"] == ENGINE_FAILED:
            end = index
    return end


def _chunked(paths: Iterator[str], size: int, *, first: int) -> Iterator[list[str]]:
    """Lists of `size` paths; the first one, and perhaps the last, of fewer."""
    if chunk := list(islice(paths, first)):
        yield chunk
    while chunk := list(islice(paths, size)):
        yield chunk
