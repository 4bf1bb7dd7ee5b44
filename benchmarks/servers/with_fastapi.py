"""FastAPI on uvicorn without batching: one process, each request in a thread of Starlette's pool (40 threads)."""

from typing import Annotated, Any

import uvicorn
from benchmarks.servers.common import Classifier, Decoder, port
from fastapi import Body, FastAPI


def make_app() -> FastAPI:
    """The service."""
    app = FastAPI()
    decoder, classifier = Decoder(), Classifier()

    # No `async`: FastAPI runs it in the pool, where decoding and inference release the GIL.
    @app.post("/classify")
    def classify(image: Annotated[bytes, Body(media_type="application/octet-stream")]) -> dict[str, Any]:
        return classifier.classify([decoder.decode(image)])[0]

    @app.get("/health")
    def health() -> str:
        return "ok"

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(), host="127.0.0.1", port=port(), log_level="warning", access_log=False)
