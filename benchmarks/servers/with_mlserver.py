"""MLServer with adaptive batching: a custom runtime; images travel in base64, as its V2 protocol in JSON wants."""

import asyncio
import json

from benchmarks.servers.common import MAX_BATCH, Classifier, Decoder, port
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import Base64Codec, StringCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse

BATCH_TIME_S = 0.002


class Service(MLModel):
    """A model as MLServer sees it."""

    async def load(self) -> bool:
        """In the worker process."""
        self._decoder, self._classifier = Decoder(), Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The images of a batch."""
        bodies = Base64Codec.decode_input(payload.inputs[0])
        answers = await asyncio.to_thread(lambda: self._classifier.classify(self._decoder.decode_all(bodies)))
        output = StringCodec.encode_output("answer", [json.dumps(answer) for answer in answers])
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main() -> None:
    """Serve."""
    settings = Settings(
        host="127.0.0.1",
        http_port=port(),
        grpc_port=port() + 1,
        metrics_port=port() + 2,
        parallel_workers=0,  # its worker processes do not start with the uvloop of today
        debug=False,
    )
    model = ModelSettings(
        name="classify",
        implementation=Service,
        max_batch_size=MAX_BATCH,
        max_batch_time=BATCH_TIME_S,
        parameters=ModelParameters(version="1"),
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    from benchmarks.servers import with_mlserver

    asyncio.run(with_mlserver.main())  # not of __main__, which its worker process could not import
