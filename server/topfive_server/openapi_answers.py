"""What the answers look like, errors among them, for `/openapi.json`."""

from typing import Any, Final

from topfive_server.errors import RequestError, all_errors
from topfive_server.metrics import CONTENT_TYPE


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """Every property is there, and no other."""
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


def _rows(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _json(description: str, schema: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}, **members}


_STRING: Final = {"type": "string"}
_FLAG: Final = {"type": "boolean"}
_COUNT: Final = {"type": "integer", "minimum": 1}
_MODEL: Final = _object(
    name=_STRING,
    version=_STRING,
    default={**_FLAG, "description": "Whether it answers requests that name no model."},
    ready=_FLAG,
    architecture=_STRING,
    classes=_COUNT,
    crop={**_COUNT, "description": "Side of the square that the network sees, in pixels."},
    max_batch={**_COUNT, "description": "Images that are computed at once at most."},
    provider=_STRING,
    device=_STRING,
    graph={**_STRING, "description": "Folder of the graph that answers, one of its family."},
    precision={**_STRING, "description": "`fp32`, `fp16` or `int8`."},
    verified={**_FLAG, "description": "Whether the export's report vouches for this very file."},
    fingerprint={
        **_STRING,
        "description": "SHA-256 of the model's files and its preprocessing, in hexadecimal.",
    },
    labels_url={"type": "string", "format": "uri-reference"},
)
_READY: Final = _object(
    ready={**_FLAG, "description": "Whether every version of every model answers."},
    draining={**_FLAG, "description": "Whether the server is shutting down."},
    models=_rows(
        _object(
            name=_STRING,
            version=_STRING,
            ready=_FLAG,
            reason={**_STRING, "description": "Why it is not ready; empty when it is."},
            provider=_STRING,
            device=_STRING,
        )
    ),
)
_VERSIONS: Final = _object(
    versions=_rows(
        _object(
            model=_STRING,
            version=_STRING,
            state={"enum": ["serving", "canary", "refused"]},
            share={
                "type": "number",
                "minimum": 0,
                "maximum": 1,
                "description": "Of the requests that name no version.",
            },
            reason={**_STRING, "description": "Why it was refused."},
        )
    )
)
_RETRY_AFTER: Final[dict[str, Any]] = {
    "Retry-After": {"required": True, "schema": {**_COUNT}, "description": "Seconds."}
}
_ERROR_HEADERS: Final[dict[int, dict[str, Any]]] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}},
    405: {"Allow": {"required": True, "schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def _errors() -> dict[str, Any]:
    by_status: dict[int, list[type[RequestError]]] = {}
    for kind in all_errors():
        by_status.setdefault(kind.status, []).append(kind)
    return {
        str(status): {
            "description": "; ".join(f"`{kind.code}`: {kind.title}" for kind in kinds),
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
            **({"headers": _ERROR_HEADERS[status]} if status in _ERROR_HEADERS else {}),
        }
        for status, kinds in by_status.items()
    }


ERRORS: Final = _errors()
"""Status -> the response object of its problem documents."""
ANSWERS: Final[dict[str, dict[str, Any]]] = {
    "/v1/models": {"200": _json("Every version in service.", _object(models=_rows(_MODEL)))},
    "/v1/models/{name}/labels": {"200": _json("A label for each class.", _object(labels=_rows(_STRING)))},
    "/healthz": {
        "200": _json("The process is alive.", _object(status={"const": "alive"}, version=_STRING)),
        "503": _json("Only a restart helps; `status` says why.", _object(status=_STRING, version=_STRING)),
    },
    "/readyz": {
        "200": _json("Every model answers.", _READY),
        "503": _json(
            "One does not, with the reason, or the server is draining.", _READY, headers=_RETRY_AFTER
        ),
    },
    "/metrics": {"200": {"description": "All metrics.", "content": {CONTENT_TYPE: {"schema": _STRING}}}},
    "/v1/admin/versions": {"200": _json("The versions.", _VERSIONS)},
    "/v1/admin/reload": {"200": _json("The versions after the look.", _VERSIONS), "400": ERRORS["400"]},
    "/v1/admin/models/{name}/canary": {"200": _json("The versions after the change.", _VERSIONS)},
}
"""Path -> status -> response object, of the FastAPI routes."""
