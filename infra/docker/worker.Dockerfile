# syntax=docker/dockerfile:1
# A worker with the torch engine. PyPI's torch brings CUDA; for the CPU alone name an index with CPU builds
# in PIP_EXTRA_INDEX_URL: pip prefers a "+cpu" build of the same version.

FROM python:3.11-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL=
RUN python -m venv /opt/codeyard
# torch first, in a layer of its own: it is large and changes seldom.
RUN --mount=type=cache,target=/root/.cache/pip /opt/codeyard/bin/pip install torch==2.13.0
WORKDIR /src
COPY pyproject.toml README.md ./
COPY shared shared
COPY producer producer
COPY worker worker
RUN --mount=type=cache,target=/root/.cache/pip /opt/codeyard/bin/pip install '.[torch]' torch==2.13.0

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin codeyard \
    && install -d -o 10001 -g 10001 /models
COPY --from=build /opt/codeyard /opt/codeyard
# HOME: caches that libraries insist on; the file system is read-only but for /tmp and /models.
ENV PATH=/opt/codeyard/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/models HOME=/tmp
USER 10001
WORKDIR /tmp
VOLUME /models
EXPOSE 9100
ENTRYPOINT ["codeyard"]
CMD ["worker", "--engine", "torch", "--metrics-port", "9100"]
