"""Scoring through a server: a few requests of several images at once, and patience when the server is away."""

import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

from topfive import (
    ApiConnectionError,
    ApiError,
    ApiResponseError,
    ApiStatusError,
    BatchLimits,
    Classification,
    Client,
    Failure,
    Model,
    OverloadedError,
    RetryPolicy,
    UnavailableError,
)
from topfive.scoring._answers import Answers, content_sha256
from topfive.scoring._errors import InterruptedJobError, RefusedError, ServerGoneError, StoppedError
from topfive.scoring._rows import ENGINE_FAILED, Label, Outcome, failed
from topfive.scoring._scorer import Identity, run_ahead
from topfive.scoring._sources import ReadError, Source

_PASSING: Final = frozenset({408, 429, 502, 503, 504})
"""Statuses that say nothing of the image; it is sent again."""
_REFUSED: Final = (OverloadedError, UnavailableError)
"""Nothing was computed: however often it happens, it is not the image's fault."""
_MAX_SUSPICIONS: Final = 3
"""Failures on the same images while the server says that it is ready, before one of them counts as the cause."""
_QUIET_ATTEMPTS: Final = 3
"""Refusals with a `Retry-After` that are waited for without a word."""
_FIRST_DELAY_S: Final = 0.5
_MAX_DELAY_S: Final = 15.0


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How the server is asked."""

    requests: int = 4
    """Requests under way at once."""
    request_images: int = 16
    """Images of one request at most; fewer when they are large."""
    patience_s: float = 300.0
    """Seconds to keep trying while no answer can be had, before the job stops."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        for name, least in (("requests", 1), ("request_images", 1), ("patience_s", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


class RemoteScorer:
    """Files to outcomes through a server; the model is pinned by name, version and fingerprint for the whole job."""

    def __init__(
        self,
        client: Client,
        source: Source,
        *,
        top_k: int,
        model: str | None = None,
        version: str | None = None,
        config: ServerConfig | None = None,
        stop: threading.Event | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Ask the server which model it is.

        Args:
            client: belongs to the scorer, which closes it; one without retries (`patient_client`).
            source: where the files are.
            top_k: labels per file.
            model: name of the model; the server's default by default.
            version: its version; by default the one that the server lists as default, or the highest.
            config: how to ask.
            stop: ends the waiting for a server that is away.
            note: is told when the server goes away and when it is back.

        Raises:
            RefusedError: the server does not offer this model.
            ApiError: the server cannot be asked.
        """
        self._client = client
        self._source = source
        self._top_k = top_k
        self._config = config or ServerConfig()
        self._stop = stop or threading.Event()
        self._note = note
        self._lock = threading.Lock()
        self._away = False
        self._in_doubt = False
        self._answered_s = time.monotonic()
        self._model = _choose(client.models(), model, version, client.url)

    @property
    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        return Identity(
            model=self._model.name,
            version=self._model.version,
            fingerprint=self._model.fingerprint,
            classes=self._model.classes,
            runs_on=self._client.url,
        )

    @property
    def chunk_files(self) -> int:
        """Images of one request."""
        return self._config.request_images

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def score(self, chunks: Iterable[list[str]], answers: Answers | None = None) -> Generator[list[Outcome]]:
        """See `Scorer.score`."""
        self._answered_s = time.monotonic()
        pool = ThreadPoolExecutor(self._config.requests, thread_name_prefix="score")
        try:
            for future in run_ahead(
                chunks,
                lambda chunk: pool.submit(self._score_chunk, chunk, answers),
                ahead=2 * self._config.requests,
            ):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _score_chunk(self, paths: Sequence[str], answers: Answers | None) -> list[Outcome]:
        files: list[bytes | Outcome] = []
        for path in paths:
            try:
                files.append(self._source.read(path))
            except ReadError as error:
                files.append(failed(error.status, error))
        images = [file for file in files if isinstance(file, bytes)]
        outcomes = iter(
            self._ask_patiently(images)
            if answers is None
            else answers.of([(content_sha256(image), image) for image in images], self._ask_patiently)
        )
        return [file if isinstance(file, Outcome) else next(outcomes) for file in files]

    def _ask_patiently(self, images: Sequence[bytes]) -> list[Outcome]:
        """Ask until every image has a lasting answer.

        Raises:
            ServerGoneError: nobody got an answer for the patience's length.
        """
        outcomes: list[Outcome | None] = [None] * len(images)
        attempt = suspicions = 0
        while missing := [index for index, outcome in enumerate(outcomes) if outcome is None]:
            problem: ApiError | None = None
            for index, answer in zip(missing, self._ask([images[i] for i in missing]), strict=True):
                if isinstance(answer, Outcome):
                    outcomes[index] = answer
                else:
                    problem = answer
            if problem is None:
                break
            attempt += 1
            ready = not isinstance(problem, _REFUSED) and self._client.ready()
            if ready:
                self._on_answer()
                suspicions += 1
            if suspicions == _MAX_SUSPICIONS:
                # The server is well and fails on these images: one of them may be to blame.
                for index in missing:
                    outcomes[index] = (
                        self._ask_patiently([images[index]])[0]
                        if len(missing) > 1
                        else failed(
                            "no-answer", f"the server is ready but gives this file no answer: {problem}"
                        )
                    )
                break
            self._wait(problem, attempt, away=not ready)
        return [outcome for outcome in outcomes if outcome is not None]

    def _ask(self, images: Sequence[bytes]) -> list[Outcome | ApiError]:
        """Ask once; an error stands for each image that should be asked for again.

        Raises:
            StoppedError: asking again cannot help.
        """
        limits = BatchLimits(images=self._config.request_images, concurrency=1)
        try:
            answers = list(
                self._client.classify_many(
                    images,
                    top_k=self._top_k,
                    model=self._model.name,
                    version=self._model.version,
                    limits=limits,
                )
            )
        except ApiConnectionError as error:
            self._in_doubt = True
            return [error] * len(images)
        except (ApiStatusError, ApiResponseError) as error:
            raise StoppedError(f"the server at {self._client.url} refuses: {error}") from error
        results = [self._read(answer) for answer in answers]
        if any(isinstance(result, Outcome) for result in results):
            try:
                self._see_same_model()
            except ApiError as error:
                return [error] * len(images)
            self._on_answer()
        return results

    def _see_same_model(self) -> None:
        """After a connection broke, see that no other weights answer under the same name and version.

        Raises:
            StoppedError: they do.
            ApiError: the server cannot be asked.
        """
        with self._lock:  # no answer passes before the verdict
            if not self._in_doubt:
                return
            chosen = self._model
            if chosen not in (replace(model, default=chosen.default) for model in self._client.models()):
                raise StoppedError(
                    f"the server at {self._client.url} came back with another {chosen.name} version {chosen.version} "
                    "than this job began with; score into another --output to use that one"
                )
            self._in_doubt = False

    def _read(self, answer: Classification | Failure) -> Outcome | ApiError:
        if isinstance(answer, Classification):
            if (answer.model, answer.version) != (self._model.name, self._model.version):
                raise StoppedError(
                    f"the server at {self._client.url} was asked for {self._model.name} version {self._model.version} "
                    f"and answers with {answer.model} version {answer.version}"
                )
            top = [Label(label.label, label.class_index, label.probability) for label in answer.top]
            return Outcome(width=answer.width, height=answer.height, top=top)
        error = answer.error
        if not isinstance(error, ApiStatusError):
            return failed("unreadable", error)
        if error.status in _PASSING:
            return error
        fallback = ENGINE_FAILED if error.status >= 500 else f"http-{error.status}"
        return failed(error.code or fallback, error)

    # --- the server's absence, which all requests share

    def _on_answer(self) -> None:
        with self._lock:
            self._answered_s = time.monotonic()
            was_away, self._away = self._away, False
        if was_away:
            self._note(f"The server at {self._client.url} answers again.")

    def _wait(self, problem: ApiError, attempt: int, *, away: bool) -> None:
        """Wait before asking again, at least as long as the server said; ends when the job is stopped.

        Raises:
            ServerGoneError: nobody got an answer for the patience's length.
            InterruptedJobError: the job was stopped.
        """
        patience_s = self._config.patience_s
        if time.monotonic() - self._answered_s > patience_s:
            raise ServerGoneError(
                f"the server at {self._client.url} gave no answer for {patience_s:g} s ({problem})"
            )
        asked_s = problem.retry_after if isinstance(problem, ApiStatusError) else None
        if away and (asked_s is None or attempt > _QUIET_ATTEMPTS):
            with self._lock:
                was_away, self._away = self._away, True
            if not was_away:
                self._note(
                    f"The server at {self._client.url} gives no answer ({problem}); trying again for {patience_s:g} s."
                )
        doubled_s = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(attempt - 1, 20))
        delay_s = max(asked_s or 0.0, doubled_s * random.uniform(0.5, 1.0))  # noqa: S311  jitter, no secret
        if self._stop.wait(delay_s):
            raise InterruptedJobError("stopped as asked, while the server was away")


def patient_client(url: str | None, **options: object) -> Client:
    """A client that leaves the retries to `RemoteScorer`, which can be stopped while it waits, and lets people go first."""
    return Client(url, retry=RetryPolicy(attempts=1), priority="batch", **options)  # type: ignore[arg-type]


def _choose(models: Sequence[Model], name: str | None, version: str | None, url: str) -> Model:
    chosen = [model for model in models if name in {None, model.name} and version in {None, model.version}]
    if not chosen:
        offered = ", ".join(f"{model.name} version {model.version}" for model in models) or "no model at all"
        wanted = " ".join(["model", *([name] if name else []), *(["version", version] if version else [])])
        raise RefusedError(f"the server at {url} does not offer {wanted}; it offers {offered}")
    return max(chosen, key=lambda model: (model.default, model.version.isdecimal() and int(model.version)))
