# syntax=docker/dockerfile:1
# A worker with vLLM on NVIDIA GPUs. CUDA comes with torch's wheels; the driver comes from the host.

FROM python:3.11-slim-bookworm AS build
RUN python -m venv /opt/codeyard
# vLLM first, in a layer of its own: it is large and changes seldom.
RUN --mount=type=cache,target=/root/.cache/pip /opt/codeyard/bin/pip install 'vllm>=0.25.1'
WORKDIR /src
COPY pyproject.toml README.md ./
COPY shared shared
COPY producer producer
COPY worker worker
RUN --mount=type=cache,target=/root/.cache/pip /opt/codeyard/bin/pip install '.[vllm]'

FROM python:3.11-slim-bookworm
# Triton compiles a launcher for its kernels at run time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin codeyard \
    && install -d -o 10001 -g 10001 /models
COPY --from=build /opt/codeyard /opt/codeyard
# HOME: compiled kernels and other caches, kept with the models over restarts.
ENV PATH=/opt/codeyard/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/models HOME=/models VLLM_NO_USAGE_STATS=1
USER 10001
WORKDIR /tmp
VOLUME /models
EXPOSE 9100
ENTRYPOINT ["codeyard"]
CMD ["worker", "--engine", "vllm", "--metrics-port", "9100"]
