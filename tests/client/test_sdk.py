"""Both clients against a server of the documented protocol: what is sent, what comes back, what is raised."""

import asyncio
import gc
import io
import multiprocessing
import pickle
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from tests.client.fake_server import FakeServer, Request, jpeg, refusal

import topfive
from topfive import AsyncClient, BatchLimits, Classification, Client, Failure, RetryPolicy
from topfive.errors import class_of_status

HASTY = RetryPolicy(first_delay_s=0.0, budget=1000)


def client_of(fake: FakeServer, **arguments: Any) -> Client:
    return Client("http://fake", transport=fake.transport(), **{"retry": HASTY, **arguments})


def async_client_of(fake: FakeServer, **arguments: Any) -> AsyncClient:
    return AsyncClient("http://fake", transport=fake.transport(), **{"retry": HASTY, **arguments})


Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ask(kind: str, fake: FakeServer) -> Ask:
    """`ask("classify", image, …)`: call that method of the client under test, to its end."""

    def call(method: str, *arguments: Any, client: dict[str, Any] | None = None, **options: Any) -> Any:
        if kind == "sync":
            with client_of(fake, **(client or {})) as sync:
                result = getattr(sync, method)(*arguments, **options)
                return list(result) if method == "classify_many" else result

        async def run() -> Any:
            async with async_client_of(fake, **(client or {})) as asynchronous:
                result = getattr(asynchronous, method)(*arguments, **options)
                return [item async for item in result] if method == "classify_many" else await result

        return asyncio.run(run())

    return call


@pytest.mark.parametrize("kind", [topfive.Client, topfive.AsyncClient])
def test_a_priority_that_is_none_is_named(kind: type) -> None:
    with pytest.raises(topfive.ClientError, match="priority is 'urgent'; it must be interactive or batch"):
        kind(priority="urgent")


def test_exported_names_are_sorted_complete_and_importable() -> None:
    assert topfive.__all__ == sorted(topfive.__all__)
    for name in topfive.__all__:
        assert getattr(topfive, name) is not None
    namespace: dict[str, Any] = {}
    exec("from topfive import *", namespace)
    assert set(topfive.__all__) <= set(namespace)
    raised = {name for name in vars(topfive.errors) if name.endswith("Error")}
    assert raised <= set(topfive.__all__), "every error class is public"
    assert set(topfive.__all__) <= set(dir(topfive))
    with pytest.raises(AttributeError, match="Nonsense"):
        topfive.Nonsense  # noqa: B018


def test_classify_returns_what_the_server_said(ask: Ask, fake: FakeServer) -> None:
    result = ask("classify", jpeg(40, 30), top_k=3)
    assert isinstance(result, Classification)
    assert (result.width, result.height, result.model, result.version) == (40, 30, "alexnet", "1")
    assert [label.class_index for label in result.top] == [0, 1, 2]
    assert result.best is result.top[0]
    assert result.best.probability == 0.5
    assert result.request_id == "r-1"
    assert result.timing_ms == {"decode": 1.5, "infer": 9.25}
    assert result.filename is None
    assert result.ok
    sent = fake.requests[0]
    assert (sent.method, sent.path, sent.query) == ("POST", "/v1/classify", {"top_k": "3"})
    assert sent.headers["content-type"] == "application/octet-stream"
    assert sent.headers["user-agent"] == f"topfive-python/{topfive.__version__}"
    assert "authorization" not in sent.headers
    assert "x-priority" not in sent.headers
    assert "x-timeout-ms" not in sent.headers


def test_model_version_and_key_are_sent(ask: Ask, fake: FakeServer) -> None:
    result = ask("classify", jpeg(), model="cats", version=3, client={"api_key": "s3cret"})
    assert (result.model, result.version) == ("cats", "3")
    assert fake.requests[0].query == {"model": "cats", "version": "3"}
    assert fake.requests[0].headers["authorization"] == "Bearer s3cret"


def test_defaults_come_from_the_environment(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Client().url == "http://127.0.0.1:8000"
    monkeypatch.setenv("TOPFIVE_URL", "http://elsewhere:99/prefix/")
    monkeypatch.setenv("TOPFIVE_API_KEY", "from-env")
    assert AsyncClient().url == "http://elsewhere:99/prefix"
    # The fake has nothing under a prefix.
    with Client(transport=fake.transport()) as client, pytest.raises(topfive.NotFoundError):
        client.models()
    assert fake.requests[0].path == "/prefix/v1/models"
    assert fake.requests[0].headers["authorization"] == "Bearer from-env"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "127.0.0.1", "http://[::1"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_wrong_address_is_refused_at_once(kind: type[Client], url: str) -> None:
    with pytest.raises(topfive.ClientError, match="address"):
        kind(url)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"top_k": 0}, "top_k"),
        ({"timeout": 0}, "timeout"),
        ({"deadline": -1}, "deadline"),
        ({"deadline": float("inf")}, "deadline is inf; it must be a finite number above 0"),
        ({"deadline": float("nan")}, "deadline"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout is inf; it must be a finite number above 0"),
        ({"timeout": httpx2.Timeout(9, read=float("inf"))}, "timeout of read is inf"),
        ({"timeout": httpx2.Timeout(None, connect=-1)}, "timeout of connect is -1"),
    ],
)
def test_nonsense_arguments_are_refused_by_name(
    ask: Ask, fake: FakeServer, options: dict[str, Any], names: str
) -> None:
    for method, image in (("classify", jpeg()), ("classify_many", [jpeg()])):
        with pytest.raises(topfive.ClientError, match=names):
            ask(method, image, **options)
    assert fake.requests == []


def test_a_time_limit_beyond_what_servers_and_sockets_take_is_a_day(server: FakeServer) -> None:
    with Client(server.url, timeout=1e306) as client:
        assert client.classify(jpeg(), deadline=100_000).ok
        assert client.classify(jpeg(), deadline=1e306).ok
        assert client.classify(jpeg(), deadline=1e306, timeout=httpx2.Timeout(None, connect=1e306)).ok
    told = [int(request.headers["x-timeout-ms"]) for request in server.requests]
    assert len(told) == 3
    assert all(86_000_000 < milliseconds <= 86_400_000 for milliseconds in told)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("key", ["schlüssel", "a\nb", " begin", "end\n", "\udcff"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(
    kind: type[Client], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(topfive.ClientError, match="the API key") as caught:
        kind(api_key=key)
    assert key.strip() not in str(caught.value)
    monkeypatch.setenv("TOPFIVE_API_KEY", key.replace("\udcff", "\xff"))
    with pytest.raises(topfive.ClientError, match="the API key"):
        kind()


def test_nonsense_limits_and_policies_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="concurrency is 0"):
        BatchLimits(concurrency=0)
    with pytest.raises(ValueError, match="attempts is 0"):
        RetryPolicy(attempts=0)
    with pytest.raises(ValueError, match="refill is nan"):
        RetryPolicy(refill=float("nan"))


def test_every_kind_of_image_arrives(ask: Ask, fake: FakeServer, tmp_path: Path) -> None:
    data = jpeg()
    path = tmp_path / "a cat.jpg"
    path.write_bytes(data)
    with path.open("rb") as file:
        named = ask("classify", file)
    results = [
        ask("classify", source)
        for source in (str(path), path, data, bytearray(data), memoryview(data), io.BytesIO(data))
    ]
    assert all(request.body == data for request in fake.requests)
    assert [result.filename for result in results] == [str(path), str(path), None, None, None, None]
    assert named.filename == str(path)


def sent_pixels(request: Request) -> Image.Image:
    return Image.open(io.BytesIO(request.body))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_pil_images_arrive_pixel_for_pixel(ask: Ask, fake: FakeServer, mode: str) -> None:
    base = Image.radial_gradient("L").resize((21, 13))
    image = base.convert("I").convert("I;16") if mode == "I;16" else base.convert(mode)
    ask("classify", image)
    sent = sent_pixels(fake.requests[0])
    assert (sent.mode, sent.size) == (mode, (21, 13))
    assert sent.tobytes() == image.tobytes()


def test_pil_images_keep_their_orientation_and_nothing_else(
    ask: Ask, fake: FakeServer, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as image:
        result = ask("classify", image)
    sent = sent_pixels(fake.requests[0]).getexif()
    assert dict(sent) == {0x0112: 6}
    assert result.filename == str(tmp_path / "turned.jpg")


@pytest.mark.parametrize(
    ("array", "mode"),
    [
        (np.arange(35, dtype=np.uint8).reshape(5, 7), "L"),
        (np.arange(35, dtype=np.uint8).reshape(5, 7, 1), "L"),
        (np.arange(105, dtype=np.uint8).reshape(5, 7, 3), "RGB"),
        (np.arange(105, dtype=np.uint8).reshape(3, 5, 7).transpose(1, 2, 0), "RGB"),
        (np.arange(140, dtype=np.uint8).reshape(5, 7, 4), "RGBA"),
        (np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000, "I;16"),
        ((np.arange(35).reshape(5, 7) * 1000).astype(">u2"), "I;16B"),
    ],
)
def test_arrays_arrive_pixel_for_pixel(
    ask: Ask, fake: FakeServer, array: np.ndarray[Any, Any], mode: str
) -> None:
    ask("classify", array)
    sent = sent_pixels(fake.requests[0])
    assert sent.mode == mode
    np.testing.assert_array_equal(np.asarray(sent), array.squeeze())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.zeros((5, 7, 3), np.float32), r"<f4 \[5, 7, 3\]"),
        (np.zeros((3, 5, 7), np.uint8), r"\[3, 5, 7\]"),
        (np.zeros((2, 5, 7, 3), np.uint8), r"\[2, 5, 7, 3\]"),
        (np.zeros((0, 7), np.uint8), r"\[0, 7\]"),
        (io.StringIO("x"), "binary mode"),
        (17, "int is not an image"),
        (None, "NoneType is not an image"),
    ],
)
def test_what_is_no_image_is_refused_here(ask: Ask, fake: FakeServer, wrong: Any, says: str) -> None:
    with pytest.raises(topfive.ImageSourceError, match=says):
        ask("classify", wrong)
    [failure] = ask("classify_many", [wrong])
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, topfive.ImageSourceError)
    assert fake.requests == []


def test_a_missing_file_is_an_oserror_with_its_name(ask: Ask) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        ask("classify", "no/such.jpg")
    assert caught.value.filename == "no/such.jpg"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "bad-request", topfive.BadRequestError),
        (401, "unauthorized", topfive.AuthenticationError),
        (403, "forbidden", topfive.AuthenticationError),
        (404, "unknown-model", topfive.NotFoundError),
        (408, "body-timeout", topfive.UploadTimeoutError),
        (413, "too-large", topfive.PayloadTooLargeError),
        (415, "unsupported-format", topfive.UnsupportedImageError),
        (422, "corrupt-image", topfive.UnreadableImageError),
        (429, "queue-full", topfive.OverloadedError),
        (500, "engine-failed", topfive.ServerError),
        (502, "", topfive.ServerError),
        (503, "draining", topfive.UnavailableError),
        (504, "deadline-exceeded", topfive.DeadlineExceededError),
        (418, "", topfive.ApiStatusError),
    ],
)
def test_refusals_are_typed_and_speak_for_the_server(
    ask: Ask, fake: FakeServer, status: int, code: str, expected: type[topfive.ApiStatusError]
) -> None:
    fake.script = [refusal(status, code, "the sentence of the server", Retry_After="0")] * 9
    with pytest.raises(topfive.ApiStatusError, match=r"^the sentence of the server$") as caught:
        ask("classify", jpeg())
    error = caught.value
    assert type(error) is expected is class_of_status(status)
    assert (error.status, error.code, error.request_id, error.retry_after) == (status, code, "r-1", 0.0)
    assert len(fake.requests) == (4 if status in {429, 503} else 1)
    assert isinstance(error, topfive.TopfiveError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_refusals_without_a_problem_document_are_told_too(ask: Ask, fake: FakeServer) -> None:
    fake.script = [(502, {"Content-Type": "text/html"}, b"<html>Bad Gateway</html>")]
    with pytest.raises(topfive.ServerError, match="502 Bad Gateway"):
        ask("classify", jpeg())


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<html>hello</html>"),
        (200, b"[1, 2]"),
        (204, b""),
        (301, b""),
        (200, b'{"images": []}'),
        (200, b'{"images": [{}], "model": "m", "version": "1"}'),
        (200, b'{"images": [{"width": 1, "height": 1, "top": 7}], "model": "m", "version": "1"}'),
        (200, b'{"images": [null], "model": "m", "version": "1"}'),
        (200, b'{"images": [{"width": 1e999, "height": 1, "top": []}], "model": "m", "version": "1"}'),
        (200, b'{"images": [{"error": {"status": 1e999}}]}'),
        (200, b'{"images": [' + 100_000 * b"["),
        (200, b'{"images": [{"error": "bad"}], "model": "m", "version": "1"}'),
        (
            200,
            b'{"images": [{"width": 1, "height": 1, "top": [{"label": "a", "class": 0, "probability": 1}]}]}',
        ),
    ],
)
def test_answers_of_something_else_are_recognized(
    ask: Ask, fake: FakeServer, answer: tuple[int, bytes]
) -> None:
    fake.script = [(answer[0], {}, answer[1])]
    with pytest.raises(topfive.ApiResponseError):
        ask("classify", jpeg())


def test_an_answer_in_a_broken_encoding_is_an_error_of_ours(ask: Ask, fake: FakeServer) -> None:
    fake.script = [(200, {"Content-Encoding": "gzip"}, b"not gzip")] * 9
    with pytest.raises(topfive.ApiConnectionError):
        ask("classify", jpeg())


def test_retries_until_the_server_has_room(ask: Ask, fake: FakeServer) -> None:
    fake.script = [
        refusal(429, "queue-full", "full", Retry_After="0"),
        httpx2.ConnectError("refused"),
        httpx2.ReadError("reset"),
    ]
    assert ask("classify", jpeg()).best.class_index == 0
    assert len(fake.requests) == 4
    assert len({request.body for request in fake.requests}) == 1, "the image is sent whole each time"


@pytest.mark.parametrize(
    "error", [httpx2.ReadTimeout("slow"), httpx2.WriteTimeout("slow"), httpx2.PoolTimeout("slow")]
)
def test_slow_answers_are_not_asked_for_again(ask: Ask, fake: FakeServer, error: Exception) -> None:
    fake.script = [error]
    with pytest.raises(topfive.ApiTimeoutError, match="did not answer within"):
        ask("classify", jpeg())
    assert len(fake.requests) == 1


def test_a_server_that_asks_for_more_patience_than_allowed_is_believed_at_once(
    ask: Ask, fake: FakeServer
) -> None:
    fake.script = [refusal(503, "not-ready", "starting", Retry_After="31")]
    with pytest.raises(topfive.UnavailableError) as caught:
        ask("classify", jpeg())
    assert caught.value.retry_after == 31
    assert len(fake.requests) == 1


def test_the_retry_budget_is_shared_by_all_calls_of_a_client(fake: FakeServer) -> None:
    fake.script = [refusal(429, "queue-full", "full", Retry_After="0")] * 1000
    with client_of(fake, retry=RetryPolicy(attempts=5, first_delay_s=0, budget=10, refill=0.1)) as client:
        for _ in range(20):
            with pytest.raises(topfive.OverloadedError):
                client.classify(jpeg())
    assert len(fake.requests) == 20 + 4, "half the budget went into retries, then each call asked once"


def test_a_deadline_is_told_to_the_server_and_limits_every_phase(fake: FakeServer) -> None:
    seen: list[dict[str, float]] = []

    class Watching(httpx2.BaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            seen.append(request.extensions["timeout"])
            return fake.transport().handle_request(request)

    with Client("http://fake", transport=Watching(), timeout=httpx2.Timeout(9, connect=1)) as client:
        client.classify(jpeg())
        client.classify(jpeg(), deadline=5)
        client.classify(jpeg(), timeout=2)
    assert seen[0] == {"connect": 1, "read": 9, "write": 9, "pool": 9}
    assert seen[1]["connect"] == 1
    assert 4 < seen[1]["read"] <= 5
    assert seen[2] == {"connect": 2, "read": 2, "write": 2, "pool": 2}
    assert 4000 < int(fake.requests[1].headers["x-timeout-ms"]) <= 5000


def test_a_deadline_ends_the_retries(ask: Ask, fake: FakeServer) -> None:
    fake.script = [refusal(429, "queue-full", "full", Retry_After="20")]
    with pytest.raises(topfive.OverloadedError):
        ask("classify", jpeg(), deadline=1)
    assert len(fake.requests) == 1


def test_models_and_readiness(ask: Ask, fake: FakeServer) -> None:
    [model] = ask("models")
    assert model == topfive.Model(
        name="alexnet", version="1", default=True, classes=1000, crop=227, fingerprint=fake.fingerprint
    )
    assert ask("ready") is True
    fake.ready = False
    assert ask("ready") is False
    fake.script = [httpx2.ConnectError("refused")]
    assert ask("ready") is False
    fake.script = [(200, {}, b'{"models": [{"name": 1}]}')]
    with pytest.raises(topfive.ApiResponseError):
        ask("models")
    fake.script = [
        (200, {}, b'{"models": [{"name": "m", "version": "1", "default": true, "classes": 1e999}]}')
    ]
    with pytest.raises(topfive.ApiResponseError):
        ask("models")
    fake.script = [refusal(401, "unauthorized", "a key is needed")]
    with pytest.raises(topfive.AuthenticationError):
        ask("models")


def pictures(count: int) -> list[bytes]:
    return [jpeg(color=(index * 7 % 256, index % 256, 90)) for index in range(count)]


def test_many_images_come_back_in_order_from_few_requests(ask: Ask, fake: FakeServer) -> None:
    images = pictures(50)
    results = ask("classify_many", images, top_k=1, limits=BatchLimits(images=8, concurrency=1))
    singles = [ask("classify", image, top_k=1) for image in images]
    assert [r.best.label for r in results] == [r.best.label for r in singles]
    batches = [r for r in fake.requests if r.headers["content-type"].startswith("multipart/form-data")]
    assert [len(r.parts) for r in batches] == [8] * 6 + [2]
    assert all(r.query == {"top_k": "1"} for r in batches)


def test_what_is_wrong_with_one_image_is_a_value_in_its_place(
    ask: Ask, fake: FakeServer, tmp_path: Path
) -> None:
    (tmp_path / 'ünï "q".jpg').write_bytes(jpeg())
    (tmp_path / "notes.txt").write_text("not an image")
    images = [tmp_path / 'ünï "q".jpg', tmp_path / "absent.jpg", tmp_path / "notes.txt", 3.5, jpeg()]
    good, absent, text, number, last = ask("classify_many", images)
    assert isinstance(good, Classification)
    assert good.filename == str(images[0])
    assert isinstance(absent.error, FileNotFoundError)
    assert absent.filename == str(images[1])
    assert isinstance(text.error, topfive.UnsupportedImageError)
    assert (text.filename, text.error.status, text.error.code) == (str(images[2]), 415, "unsupported-format")
    assert not text.ok
    assert isinstance(number.error, topfive.ImageSourceError)
    assert last.ok
    assert len(fake.requests) == 1
    assert fake.requests[0].parts[1][0] == "notes.txt"


def test_a_batch_of_which_nothing_could_be_classified(ask: Ask) -> None:
    results = ask("classify_many", [b"no", b"neither", b""])
    assert [type(r.error) for r in results] == [topfive.UnsupportedImageError] * 3


def test_names_that_are_no_unicode_can_be_sent(ask: Ask, fake: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    path.write_bytes(jpeg())
    [result, _] = ask("classify_many", [path, jpeg()])
    assert result.filename == str(path)
    assert fake.requests[0].parts[0][0] == "caf?.jpg"


def test_batches_are_bounded_by_bytes(ask: Ask, fake: FakeServer) -> None:
    small, large = jpeg(), jpeg(2000, 2000)
    assert len(large) > 10 * len(small)
    ask(
        "classify_many",
        [small, small, large, small, small, small],
        limits=BatchLimits(total_bytes=3 * len(small), concurrency=1),
    )
    assert [len(r.parts) for r in fake.requests] == [2, 1, 3]


def test_a_limit_of_the_server_is_found_by_halving(ask: Ask, fake: FakeServer) -> None:
    fake.max_images = 3
    images = pictures(16)
    results = ask("classify_many", images)
    assert [r.best.label for r in results] == [ask("classify", image).best.label for image in images]
    fake.max_images = 0
    assert [type(r.error) for r in ask("classify_many", images[:2])] == [topfive.PayloadTooLargeError] * 2


def test_overload_of_one_batch_is_a_value_and_a_wrong_key_is_raised(ask: Ask, fake: FakeServer) -> None:
    fake.script = [refusal(504, "deadline-exceeded", "too late")]
    assert [type(r.error) for r in ask("classify_many", pictures(2))] == [topfive.DeadlineExceededError] * 2
    for status, expected in (
        (401, topfive.AuthenticationError),
        (404, topfive.NotFoundError),
        (400, topfive.BadRequestError),
    ):
        fake.script = [refusal(status, "x", "no")]
        with pytest.raises(expected):
            ask("classify_many", pictures(2))
    fake.script = [httpx2.ConnectError("refused")] * 99
    with pytest.raises(topfive.ApiConnectionError, match="topfive serve"):
        ask("classify_many", pictures(2))


def test_nothing_to_classify(ask: Ask, fake: FakeServer) -> None:
    assert ask("classify_many", []) == []
    assert fake.requests == []


def test_images_are_read_only_as_fast_as_answers_are_taken(fake: FakeServer) -> None:
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield jpeg()

    with client_of(fake) as client:
        results = client.classify_many(endless(), limits=BatchLimits(images=2, concurrency=2))
        for _ in range(3):
            next(results)
        assert read <= 2 * (2 * 2 + 2)
        results.close()  # type: ignore[attr-defined]


def test_async_images_are_read_only_as_fast_as_answers_are_taken(fake: FakeServer) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield jpeg()

    async def run() -> None:
        async with async_client_of(fake) as client:
            results = client.classify_many(endless(), limits=BatchLimits(images=2, concurrency=2))
            for _ in range(3):
                await anext(results)
            assert read <= 2 * (2 * 2 + 2)
            await results.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())


def test_requests_of_one_call_overlap_up_to_the_limit(server: FakeServer) -> None:
    server.delay_s = 0.05
    limits = BatchLimits(images=1, concurrency=3)
    with Client(server.url) as client:
        assert len(list(client.classify_many(pictures(12), limits=limits))) == 12
    assert server.busiest == 3

    async def run() -> int:
        async with AsyncClient(server.url) as client:
            return len([r async for r in client.classify_many(pictures(12), limits=limits)])

    server.busiest = 0
    assert asyncio.run(run()) == 12
    assert server.busiest == 3


def test_one_client_serves_many_threads(server: FakeServer) -> None:
    images = pictures(64)
    with Client(server.url) as client, ThreadPoolExecutor(16) as pool:
        labels = list(pool.map(lambda image: client.classify(image).best.label, images))
        again = [client.classify(image).best.label for image in images]
    assert labels == again
    assert len(set(labels)) == len(images)


def test_one_async_client_serves_several_event_loops(server: FakeServer) -> None:
    client = AsyncClient(server.url)

    async def run() -> str:
        try:
            first, second = await asyncio.gather(client.classify(jpeg()), client.classify(jpeg()))
            assert first.best == second.best
            return first.best.label
        finally:
            await client.aclose()

    labels = [asyncio.run(run()), asyncio.run(run())]
    threads = [threading.Thread(target=lambda: labels.append(asyncio.run(run()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(labels) == 5
    assert len(set(labels)) == 1


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_event_loop_that_ends_takes_its_connections_along(server: FakeServer) -> None:
    client = AsyncClient(server.url)
    assert asyncio.run(client.ready())
    before = open_descriptors()
    for _ in range(20):
        assert asyncio.run(client.ready())
    gc.collect()  # an unclosed socket would warn here, and warnings are errors
    until = time.monotonic() + 30
    while open_descriptors() > before + 5 and time.monotonic() < until:
        time.sleep(0.01)  # the server's threads close their ends
    assert open_descriptors() <= before + 5
    assert len(client._http) <= 1


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_event_loop_that_is_closed_bare_is_not_kept(server: FakeServer) -> None:
    client = AsyncClient(server.url)
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(client.ready())
    loop.close()
    gone = weakref.ref(loop)
    del loop
    assert asyncio.run(client.ready())
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore:asynchronous generator.*shutdown_asyncgens:ResourceWarning")
def test_an_event_loop_that_shuts_down_may_still_ask(server: FakeServer) -> None:
    client = AsyncClient(server.url)

    async def run() -> None:
        assert await client.ready()
        await asyncio.get_running_loop().shutdown_asyncgens()
        assert await client.ready()

    asyncio.run(run())


def test_an_async_client_that_is_dropped_closes_its_connections(server: FakeServer) -> None:
    async def run() -> None:
        assert await AsyncClient(server.url).ready()
        gc.collect()  # an unclosed socket would warn here, and warnings are errors

    asyncio.run(run())


def answer_of_a_forked_child(client: Client | AsyncClient, ask: Callable[[], str]) -> str:
    """What `ask` says in a child that is forked while another thread, as it were, holds the client's lock."""
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: writer.send(ask()), daemon=True)
    with client._lock:
        child.start()
    try:
        assert reader.poll(30), "the child is stuck"
        return str(reader.recv())
    finally:
        child.kill()
        child.join()
        reader.close()
        writer.close()


def test_a_client_goes_on_working_in_a_forked_child(server: FakeServer) -> None:
    with Client(server.url) as client:

        def ask() -> str:
            return client.classify(jpeg()).best.label

        before = ask()
        assert answer_of_a_forked_child(client, ask) == before
        assert ask() == before, "the parent's connection is whole"


def test_an_async_client_goes_on_working_in_a_forked_child(server: FakeServer) -> None:
    client = AsyncClient(server.url)

    async def run() -> str:
        try:
            return (await client.classify(jpeg())).best.label
        finally:
            await client.aclose()

    def ask() -> str:
        return asyncio.run(run())

    assert answer_of_a_forked_child(client, ask) == ask()


def test_clients_leave_no_connection_behind(server: FakeServer) -> None:
    with Client(server.url) as client:
        client.classify(jpeg())
        list(client.classify_many(pictures(40)))

    async def run() -> None:
        async with AsyncClient(server.url) as asynchronous:
            await asynchronous.classify(jpeg())

    asyncio.run(run())
    del client
    gc.collect()  # an unclosed socket would warn here, and warnings are errors


def test_a_closed_client_says_so(fake: FakeServer) -> None:
    client = client_of(fake)
    client.models()
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.models()


def test_nobody_listening_is_one_sentence_with_the_address(nobody: str) -> None:
    with Client(nobody, retry=HASTY) as client, pytest.raises(topfive.ApiConnectionError) as caught:
        client.classify(jpeg())
    assert nobody in str(caught.value)
    assert "topfive serve" in str(caught.value)
    assert caught.value.exit_code == 3
    assert isinstance(caught.value.__cause__, httpx2.ConnectError)


def test_a_real_slow_server_times_out(server: FakeServer) -> None:
    server.delay_s = 1.0
    with Client(server.url) as client, pytest.raises(topfive.ApiTimeoutError, match=r"deadline of 0.1 s"):
        client.classify(jpeg(), deadline=0.1)
