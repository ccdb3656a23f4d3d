# syntax=docker/dockerfile:1
# The HTTP gateway. Build from the root of the repository: docker build -f infra/docker/gateway.Dockerfile .

FROM python:3.11-slim-bookworm AS build
RUN python -m venv /opt/codeyard
WORKDIR /src
COPY pyproject.toml README.md ./
COPY shared shared
COPY producer producer
COPY worker worker
RUN --mount=type=cache,target=/root/.cache/pip /opt/codeyard/bin/pip install '.[gateway,grpc]'

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin codeyard
COPY --from=build /opt/codeyard /opt/codeyard
ENV PATH=/opt/codeyard/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /tmp
EXPOSE 8080
ENTRYPOINT ["codeyard"]
CMD ["gateway", "--host", "0.0.0.0"]
