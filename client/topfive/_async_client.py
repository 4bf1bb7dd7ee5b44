"""The asyncio client."""

import asyncio
import ssl
import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import NamedTuple, Self

import httpx2

from topfive._batches import Batcher, BatchLimits, load_or_fail
from topfive._forks import reset_in_children
from topfive._images import ImageSource, Upload, load
from topfive._protocol import Conversation, Options, Reply, Send, Sleep, Steps, T
from topfive._results import Classification, Failure, Model
from topfive._retry import RetryBudget, RetryPolicy
from topfive._settings import LIMITS, Priority, Settings


class _Connections(NamedTuple):
    """Those of one event loop."""

    http: httpx2.AsyncClient
    until_the_end: AsyncGenerator[None]


async def _until_the_end(http: httpx2.AsyncClient) -> AsyncGenerator[None]:
    """Suspended while `http` is in use. An event loop that shuts down closes its generators: that closes `http` too."""
    try:
        yield
    finally:
        await http.aclose()


class AsyncClient:
    """Asks a topfive server what is in images, from asyncio.

        async with topfive.AsyncClient("http://127.0.0.1:8000") as client:
            print((await client.classify("cat.jpg")).best.label)

    The same as `Client`, whose docstrings hold for every argument and error. It may be used from several event loops,
    one after the other or in several threads: each has connections of its own. `aclose` closes them when awaited in
    that loop; `asyncio.run` does so too as it ends the loop (`loop.shutdown_asyncgens`).
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
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._settings = Settings.make(url, api_key, timeout, retry, priority)
        self._verify = verify
        self._transport = transport
        self.reset()
        reset_in_children(self)

    def reset(self) -> None:
        """Start afresh, as a forked child must: connections and held locks are its parent's."""
        self._lock = threading.Lock()
        self._http: dict[AbstractEventLoop, _Connections] = {}
        self._conversation = Conversation(
            url=self._settings.url, policy=self._settings.retry, budget=RetryBudget(self._settings.retry)
        )

    @property
    def url(self) -> str:
        """Address of the server."""
        return self._settings.url

    async def classify(
        self,
        image: ImageSource,
        *,
        top_k: int | None = None,
        model: str | None = None,
        version: str | int | None = None,
        timeout: float | httpx2.Timeout | None = None,  # noqa: ASYNC109  of each phase
        deadline: float | None = None,
    ) -> Classification:
        """The most probable classes of one image; see `Client.classify`."""
        options = self._settings.options(
            top_k=top_k, model=model, version=version, timeout=timeout, deadline=deadline
        )
        upload = load(image) if isinstance(image, bytes) else await asyncio.to_thread(load, image)
        return await self._drive(self._conversation.classify(upload, options))

    def classify_many(
        self,
        images: Iterable[ImageSource] | AsyncIterable[ImageSource],
        *,
        top_k: int | None = None,
        model: str | None = None,
        version: str | int | None = None,
        timeout: float | httpx2.Timeout | None = None,
        deadline: float | None = None,
        limits: BatchLimits | None = None,
    ) -> AsyncIterator[Classification | Failure]:
        """The answers for many images, in their order; `images` may be asynchronous. See `Client.classify_many`."""
        options = self._settings.options(
            top_k=top_k, model=model, version=version, timeout=timeout, deadline=deadline
        )
        return self._classify_many(images, options, limits or BatchLimits())

    async def _classify_many(
        self,
        images: Iterable[ImageSource] | AsyncIterable[ImageSource],
        options: Options,
        limits: BatchLimits,
    ) -> AsyncIterator[Classification | Failure]:
        slots = asyncio.Semaphore(limits.concurrency)

        async def ask(batch: list[Upload | Failure]) -> list[Classification | Failure]:
            async with slots:
                return await self._drive(self._conversation.classify_batch(batch, options))

        pending: deque[asyncio.Task[list[Classification | Failure]]] = deque()
        batcher = Batcher(limits=limits)
        try:
            async for image in _each(images):
                if batch := batcher.add(await asyncio.to_thread(load_or_fail, image)):
                    pending.append(asyncio.create_task(ask(batch)))
                while pending and (pending[0].done() or len(pending) > 2 * limits.concurrency):
                    for result in await pending.popleft():
                        yield result
            if batch := batcher.rest():
                pending.append(asyncio.create_task(ask(batch)))
            while pending:
                for result in await pending.popleft():
                    yield result
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def models(self) -> tuple[Model, ...]:
        """The models that the server offers; see `Client.models`."""
        return await self._drive(self._conversation.models(self._settings.timeout))

    async def ready(self) -> bool:
        """Whether the server says that it can answer; see `Client.ready`."""
        return await self._drive(self._conversation.ready(self._settings.timeout))

    async def aclose(self) -> None:
        """Close the connections of the running event loop; a later call opens new ones."""
        with self._lock:
            connections = self._http.pop(asyncio.get_running_loop(), None)
        if connections is not None:
            await connections.until_the_end.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _connections(self) -> httpx2.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            # What is left of loops that ended holds them in memory.
            for ended in [other for other in self._http if other.is_closed()]:
                del self._http[ended]
            known = self._http.get(loop)
            if known is not None and not known.http.is_closed:
                return known.http
            http = httpx2.AsyncClient(
                base_url=self._settings.url,
                headers=self._settings.headers,
                verify=self._verify,
                limits=LIMITS,
                transport=self._transport,
            )
            new = self._http[loop] = _Connections(http=http, until_the_end=_until_the_end(http))
        await anext(new.until_the_end)
        return http

    async def _drive(self, steps: Steps[T]) -> T:
        """Do what `steps` asks for until it returns."""
        http = await self._connections()
        reply: Reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            match step:
                case Send():
                    try:
                        reply = await http.send(step.request(http))
                    except httpx2.RequestError as error:
                        reply = error
                case Sleep():
                    await asyncio.sleep(step.seconds)
                    reply = None


async def _each(images: Iterable[ImageSource] | AsyncIterable[ImageSource]) -> AsyncIterator[ImageSource]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    else:
        for image in images:
            yield image
