"""The blocking client."""

import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import httpx2

from topfive._batches import Batcher, BatchLimits, load_or_fail
from topfive._forks import reset_in_children
from topfive._images import ImageSource, Upload, load
from topfive._protocol import Conversation, Options, Reply, Send, Sleep, Steps, T
from topfive._results import Classification, Failure, Model
from topfive._retry import RetryBudget, RetryPolicy
from topfive._settings import LIMITS, Priority, Settings


class Client:
    """Asks a topfive server what is in images.

        with topfive.Client("http://127.0.0.1:8000") as client:
            print(client.classify("cat.jpg").best.label)

    Make one and keep it: it holds the connections. It may be shared between threads, and goes on working in a forked
    child, which gets connections of its own.

    Args:
        url: address of the server; by default `TOPFIVE_URL` or http://127.0.0.1:8000.
        api_key: sent as `Authorization: Bearer …`; by default `TOPFIVE_API_KEY`, or none.
        timeout: seconds for each phase of a request, or an `httpx2.Timeout` with the phases apart; by default 5 s to
            connect and 30 s for the others.
        retry: when to ask again; see `RetryPolicy`.
        priority: `batch` lets the requests of others go first; sent as `X-Priority`, by default nothing is.
        verify: how TLS certificates are checked: True for the usual authorities, or an `ssl.SSLContext`.
        transport: replaces the network, in tests or to go through a socket of your own.

    Raises:
        ClientError: the address is not http:// or https://, or the key, a time limit or the priority makes no sense.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | httpx2.Timeout | None = None,
        retry: RetryPolicy | None = None,
        priority: Priority | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._settings = Settings.make(url, api_key, timeout, retry, priority)
        self._verify = verify
        self._transport = transport
        self._closed = False
        self.reset()
        reset_in_children(self)

    def reset(self) -> None:
        """Start afresh, as a forked child must: connections and held locks are its parent's."""
        self._lock = threading.Lock()
        self._http: httpx2.Client | None = None
        self._conversation = Conversation(
            url=self._settings.url, policy=self._settings.retry, budget=RetryBudget(self._settings.retry)
        )

    @property
    def url(self) -> str:
        """Address of the server."""
        return self._settings.url

    def classify(
        self,
        image: ImageSource,
        *,
        top_k: int | None = None,
        model: str | None = None,
        version: str | int | None = None,
        timeout: float | httpx2.Timeout | None = None,
        deadline: float | None = None,
    ) -> Classification:
        """The most probable classes of one image.

        Args:
            image: a path, an image file's bytes, a binary file, a PIL image, or a numpy array: uint8 [height, width]
                (grey), [height, width, 3] (RGB) or [height, width, 4] (RGBA), or uint16 [height, width].
            top_k: how many classes; 5 by default.
            model: name of the model; the server's default by default.
            version: its version; the newest by default.
            timeout: as for the client, for this call.
            deadline: seconds for the whole call, retries included; the server is told (`X-Timeout-Ms`) and drops the
                work when it passes.

        Raises:
            ApiStatusError: the server refused; its subclasses tell why.
            ApiConnectionError: no server answered, or (`ApiTimeoutError`) not in time.
            ApiResponseError: what answered is no topfive server.
            OSError: the file cannot be read.
            ImageSourceError: `image` is none of the above.
        """
        options = self._settings.options(
            top_k=top_k, model=model, version=version, timeout=timeout, deadline=deadline
        )
        return self._drive(self._conversation.classify(load(image), options))

    def classify_many(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int | None = None,
        model: str | None = None,
        version: str | int | None = None,
        timeout: float | httpx2.Timeout | None = None,
        deadline: float | None = None,
        limits: BatchLimits | None = None,
    ) -> Iterator[Classification | Failure]:
        """The answers for many images, in their order, as they come; memory stays bounded however many there are.

        What goes wrong with one image is a value, a `Failure`; what would go wrong with every image is raised.

        Args:
            images: any number of what `classify` takes; read while the answers come.
            top_k: as `classify`.
            model: as `classify`.
            version: as `classify`.
            timeout: as `classify`, for each request.
            deadline: as `classify`, for each request.
            limits: how many images and bytes go into one request, and how many requests at once.

        Raises:
            BadRequestError, AuthenticationError, NotFoundError: the server refuses such requests altogether.
            ApiConnectionError, ApiResponseError: as `classify`.
        """
        options = self._settings.options(
            top_k=top_k, model=model, version=version, timeout=timeout, deadline=deadline
        )
        return self._classify_many(images, options, limits or BatchLimits())

    def _classify_many(
        self, images: Iterable[ImageSource], options: Options, limits: BatchLimits
    ) -> Iterator[Classification | Failure]:
        def ask(batch: list[Upload | Failure]) -> list[Classification | Failure]:
            return self._drive(self._conversation.classify_batch(batch, options))

        pending: deque[Future[list[Classification | Failure]]] = deque()
        batcher = Batcher(limits=limits)
        with ThreadPoolExecutor(limits.concurrency, thread_name_prefix="topfive") as pool:
            try:
                for image in images:
                    if batch := batcher.add(load_or_fail(image)):
                        pending.append(pool.submit(ask, batch))
                    while pending and (pending[0].done() or len(pending) > 2 * limits.concurrency):
                        yield from pending.popleft().result()
                if batch := batcher.rest():
                    pending.append(pool.submit(ask, batch))
                while pending:
                    yield from pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def models(self) -> tuple[Model, ...]:
        """The models that the server offers.

        Raises:
            ApiStatusError, ApiConnectionError, ApiResponseError: as `classify`.
        """
        return self._drive(self._conversation.models(self._settings.timeout))

    def ready(self) -> bool:
        """Whether the server says that it can answer (`/readyz`); False also where none answers."""
        return self._drive(self._conversation.ready(self._settings.timeout))

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        with self._lock:
            self._closed = True
            http, self._http = self._http, None
        if http is not None:
            http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connections(self) -> httpx2.Client:
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed; make a new one")
            if self._http is None:
                self._http = httpx2.Client(
                    base_url=self._settings.url,
                    headers=self._settings.headers,
                    verify=self._verify,
                    limits=LIMITS,
                    transport=self._transport,
                )
            return self._http

    def _drive(self, steps: Steps[T]) -> T:
        """Do what `steps` asks for until it returns."""
        http = self._connections()
        reply: Reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            match step:
                case Send():
                    try:
                        reply = http.send(step.request(http))
                    except httpx2.RequestError as error:
                        reply = error
                case Sleep():
                    time.sleep(step.seconds)
                    reply = None
