# The serving image: HTTP server, ONNX Runtime and Pillow; no torch, no training.
#
#   docker build -t topfive .
#   docker run --rm -p 8000:8000 -v "$PWD/models:/models:ro" topfive
#
# On an NVIDIA GPU, CUDA 13 and cuDNN 9 come from the base image, or as pip packages from the `cuda` extra:
#
#   docker build -t topfive:cuda --build-arg BASE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 .
#   docker build -t topfive:cuda --build-arg EXTRAS=server,cuda .
#   docker run --rm --gpus all -p 8000:8000 -v "$PWD/models:/models:ro" topfive:cuda

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS python
# The Python images have an interpreter; CUDA's have none.
RUN command -v python3 || (apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*)

FROM python AS build
ARG EXTRAS=server
RUN python3 -c 'import ensurepip' || (apt-get update && apt-get install -y --no-install-recommends python3-venv)
RUN python3 -m venv /opt/topfive
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY client /src/client
COPY server /src/server
COPY export /src/export
COPY training /src/training
RUN /opt/topfive/bin/pip install --no-cache-dir --disable-pip-version-check -c /src/constraints.txt "/src[${EXTRAS}]"

FROM python
COPY --from=build /opt/topfive /opt/topfive
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin topfive
# glibc: buffers of decoded photographs come from the heap and stay there, instead of a page fault per page and image.
ENV PATH=/opt/topfive/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    TOPFIVE_SERVE_HOST=0.0.0.0 \
    TOPFIVE_SERVE_PORT=8000 \
    MALLOC_MMAP_THRESHOLD_=33554432 \
    MALLOC_TRIM_THRESHOLD_=268435456
USER 10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python3", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["topfive"]
CMD ["serve", "/models"]
