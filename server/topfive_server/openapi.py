"""`/openapi.json`: the description of `POST /v1/classify`, which is no FastAPI route, and what all routes answer."""

from collections.abc import Collection
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from topfive_server.classify import MAX_TOP_K
from topfive_server.job import PRIORITIES
from topfive_server.openapi_answers import ANSWERS, ERRORS

_TOP: Final[dict[str, Any]] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["label", "class", "probability"],
        "properties": {
            "label": {"type": "string"},
            "class": {"type": "integer", "minimum": 0},
            "probability": {"type": "number", "minimum": 0, "maximum": 1.0001},
        },
    },
}
_PROBLEM: Final[dict[str, Any]] = {
    "type": "object",
    "description": "RFC 9457",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:topfive:error:corrupt-image"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "request_id": {"type": "string"},
        "images": {
            "type": "array",
            "items": {"$ref": "#/components/schemas/Image"},
            "description": "Of a multipart request of which no image was classified.",
        },
    },
}
_IMAGE: Final[dict[str, Any]] = {
    "type": "object",
    "description": "One image's answer: `top`, or `error`.",
    "required": ["filename"],
    "properties": {
        "filename": {"type": ["string", "null"]},
        "width": {"type": "integer"},
        "height": {"type": "integer"},
        "top": _TOP,
        "error": {"$ref": "#/components/schemas/Problem"},
    },
}
_ANSWER: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["model", "version", "images"],
    "properties": {
        "model": {"type": "string"},
        "version": {"type": "string"},
        "images": {"type": "array", "items": {"$ref": "#/components/schemas/Image"}},
    },
}
_FORMATS: Final = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff")
_BINARY: Final[dict[str, Any]] = {"schema": {"type": "string", "format": "binary"}}


def _parameter(name: str, place: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": False, "schema": schema, "description": description}


_SCHEMES: Final[dict[str, Any]] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


CLASSIFY: Final[dict[str, Any]] = {
    "tags": ["classify"],
    "summary": "Classify one image, or several",
    "description": "Send the image as the body (`curl -T cat.jpg`), or one or many as multipart files (`curl -F file=@a.jpg`).",
    "operationId": "classify",
    "parameters": [
        _parameter(
            "top_k",
            "query",
            {"type": "integer", "minimum": 1, "maximum": MAX_TOP_K, "default": 5},
            "Labels an image.",
        ),
        _parameter("model", "query", {"type": "string"}, "The model's name; the default model without one."),
        _parameter("version", "query", {"type": "string"}, "The model's version; the newest without one."),
        _parameter(
            "X-Timeout-Ms",
            "header",
            {"type": "integer", "minimum": 1, "maximum": 86_400_000},
            "Deadline in milliseconds; refused at once (429) when it cannot be met, 504 when it passes.",
        ),
        _parameter(
            "X-Priority",
            "header",
            {"type": "string", "enum": list(PRIORITIES), "default": "interactive"},
            "Images of priority `batch` let the others go first.",
        ),
        _parameter("X-Request-ID", "header", {"type": "string"}, "Comes back, and is in the log."),
    ],
    "requestBody": {
        "required": True,
        "content": {
            **dict.fromkeys(_FORMATS, _BINARY),
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                            "description": "The images; every part is taken for one, whatever its name.",
                        }
                    },
                    "additionalProperties": False,
                },
                "encoding": {"file": {"contentType": ", ".join(_FORMATS)}},
            },
        },
    },
    "responses": {
        "200": {
            "description": "At least one image was classified; the others carry their `error`.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}},
        },
        **ERRORS,
    },
}


def _say_what_we_answer(path: str, operation: dict[str, Any]) -> None:
    """Add the schemas of a route's answers, and its errors.

    FastAPI documents 422 with a body of its own for bad parameters; here they get 400 and a problem document.
    """
    responses = operation["responses"]
    responses |= ANSWERS[path]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
        responses |= {status: ERRORS[status] for status in ("400", "404")}


def _say_what_needs_a_key(document: dict[str, Any], open_paths: Collection[str]) -> None:
    document["components"]["securitySchemes"] = _SCHEMES
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path not in open_paths:
                operation["security"] = [{name: []} for name in _SCHEMES]
                operation["responses"] |= {"401": ERRORS["401"]}


def describe_api(api: FastAPI, *, open_paths: Collection[str] | None) -> None:
    """Put the classify route, all answers and the shared schemas into the application's OpenAPI document.

    With API keys, `open_paths` are those that need none; None without keys.
    """

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = get_openapi(
                title=api.title, version=api.version, summary=api.summary, routes=api.routes
            )
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    _say_what_we_answer(path, operation)
            put = {**CLASSIFY, "operationId": "classify_put"}  # what `curl -T` sends
            post = {**CLASSIFY}
            document["paths"] = {"/v1/classify": {"post": post, "put": put}, **document["paths"]}
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas.update(Answer=_ANSWER, Image=_IMAGE, Problem=_PROBLEM)
            if open_paths is not None:
                _say_what_needs_a_key(document, open_paths)
            api.openapi_schema = document
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
