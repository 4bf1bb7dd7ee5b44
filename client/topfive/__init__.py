"""topfive: an image in, five labels out. The SDK, and the light kernel that every other part may import."""

import importlib
from typing import TYPE_CHECKING, Any

from topfive._version import __version__

if TYPE_CHECKING:
    from topfive._async_client import AsyncClient
    from topfive._batches import BatchLimits
    from topfive._client import Client
    from topfive._images import ImageSource, ImageSourceError
    from topfive._results import Classification, Failure, Label, Model
    from topfive._retry import RetryPolicy
    from topfive._settings import ClientError
    from topfive.errors import (
        ApiConnectionError,
        ApiError,
        ApiResponseError,
        ApiStatusError,
        ApiTimeoutError,
        AuthenticationError,
        BadRequestError,
        DeadlineExceededError,
        NotFoundError,
        OverloadedError,
        PayloadTooLargeError,
        ServerError,
        TopfiveError,
        UnavailableError,
        UnreadableImageError,
        UnsupportedImageError,
        UploadTimeoutError,
    )

__all__ = [
    "ApiConnectionError",
    "ApiError",
    "ApiResponseError",
    "ApiStatusError",
    "ApiTimeoutError",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "BatchLimits",
    "Classification",
    "Client",
    "ClientError",
    "DeadlineExceededError",
    "Failure",
    "ImageSource",
    "ImageSourceError",
    "Label",
    "Model",
    "NotFoundError",
    "OverloadedError",
    "PayloadTooLargeError",
    "RetryPolicy",
    "ServerError",
    "TopfiveError",
    "UnavailableError",
    "UnreadableImageError",
    "UnsupportedImageError",
    "UploadTimeoutError",
    "__version__",
]

_HOME = {
    "AsyncClient": "_async_client",
    "BatchLimits": "_batches",
    "Classification": "_results",
    "Client": "_client",
    "ClientError": "_settings",
    "Failure": "_results",
    "ImageSource": "_images",
    "ImageSourceError": "_images",
    "Label": "_results",
    "Model": "_results",
    "RetryPolicy": "_retry",
}
"""Where a name lives that is not in `errors`. The server, training and `topfive --help` need none of it, so the HTTP
library is loaded with the first name that is used."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
