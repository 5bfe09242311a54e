# syntax=docker/dockerfile:1
# docker build --target gateway|triton|export|demo .     (k8s/README.md says which is for what)
#
# gateway  answers HTTP and gRPC; no GPU, no compiler, no torch
# triton   NVIDIA's Triton, which serves the engines; its TensorRT is the one that export builds with
# export   builds the engines, on the GPU that will serve them
# demo     gateway, Triton of a wheel and sam-tiny in one container, without a GPU
ARG PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254
# By tag only: its digest could not be looked up where this was written. To pin it,
#   docker buildx imagetools inspect nvcr.io/nvidia/tritonserver:26.05-py3 --format '{{.Manifest.Digest}}'
# and build with --build-arg TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.05-py3@<that>.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.05-py3

# --- what the gateway installs -----------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/sam
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
RUN /opt/sam/bin/pip install -c constraints.txt ".[serve,otel]"

# --- gateway ------------------------------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS gateway
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sam-gateway" \
      org.opencontainers.image.description="Segment Anything: HTTP and gRPC gateway with an embedding cache" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/sam/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 SAM_HOST=0.0.0.0 SAM_LOG_FORMAT=json
COPY --from=packages /opt/sam /opt/sam
WORKDIR /tmp
USER 65532:65532
EXPOSE 8080 50051 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["/opt/sam/bin/python3", "-m", "service.probe", "/healthz"]
ENTRYPOINT ["/opt/sam/bin/python3", "-m", "service"]

# --- triton -------------------------------------------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${TRITON_IMAGE} AS triton
LABEL org.opencontainers.image.title="sam-triton" org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /opt/sam
COPY export export
COPY service/__init__.py service/tensors.py service/
COPY model_repository/serve.sh /opt/sam/serve.sh
# Fails the build on an image without TensorRT; serve.sh checks the engines' version again at every start.
RUN python3 -m export.check_engines
ENV PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
EXPOSE 8001 8002
ENTRYPOINT ["/opt/sam/serve.sh"]
CMD ["/models"]

# --- export -------------------------------------------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${TRITON_IMAGE} AS export
# The TensorRT that TRITON_IMAGE carries: python3 -m export.check_engines tells it; another fails the build below.
ARG TENSORRT_VERSION=10.16.1
LABEL org.opencontainers.image.title="sam-export" org.opencontainers.image.licenses="Apache-2.0"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/sam
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY export export
COPY model_repository model_repository
RUN python3 -m export.check_engines --expect "${TENSORRT_VERSION}" \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install -c constraints.txt -e ".[export]" "tensorrt==${TENSORRT_VERSION}.*"
ENV PATH=/opt/venv/bin:$PATH
USER 65532:65532
ENTRYPOINT ["/opt/venv/bin/python3", "-m", "export"]

# --- demo ---------------------------------------------------------------------------------------------------------------
FROM packages AS demo-packages
RUN /opt/sam/bin/pip install -c constraints.txt ".[serve,cpu]" \
    && /opt/sam/bin/pip install --no-deps nvidia-pytriton==0.7.0

FROM gateway AS demo
LABEL org.opencontainers.image.title="sam-demo"
COPY --from=demo-packages /opt/sam /opt/sam
COPY model_repository/cpu /models
ENV SAM_MODEL_REPOSITORY=/models SAM_LOG_FORMAT=console
CMD ["--embedded"]

# What `docker build .` makes.
FROM gateway
