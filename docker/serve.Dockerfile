# syntax=docker/dockerfile:1
# `robustfeat serve` on processors (EXTRA=cpu) or on NVIDIA GPUs (EXTRA=gpu); docs/deploy.md has the commands.

FROM python:3.13-slim-trixie AS wheel
WORKDIR /src
COPY docker/locks/build.txt docker/locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/build && \
    /opt/build/bin/pip install --require-hashes --only-binary=:all: -r docker/locks/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY robustfeat/ robustfeat/
RUN /opt/build/bin/python -m hatchling build -t wheel -d /wheel

FROM python:3.13-slim-trixie AS environment
ARG EXTRA=cpu
WORKDIR /src
COPY docker/locks/ docker/locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/robustfeat && \
    /opt/robustfeat/bin/pip install --require-hashes --only-binary=:all: -r "docker/locks/${EXTRA}.txt"
COPY --from=wheel /wheel/ /wheel/
RUN /opt/robustfeat/bin/pip install --no-index --no-deps /wheel/*.whl

FROM python:3.13-slim-trixie AS runtime
COPY --from=environment /opt/robustfeat /opt/robustfeat
# Models of the Hub are kept in /cache, the only place besides /tmp that is written to.
ENV PATH=/opt/robustfeat/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s CMD \
    ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
# nobody, by number: Kubernetes' runAsNonRoot knows no names.
USER 65534:65534
ENTRYPOINT ["robustfeat"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

# With a model of the Hub inside: --target baked --build-arg MODEL=ORG/NAME --build-arg REVISION=COMMIT
FROM runtime AS baked
ARG MODEL
ARG REVISION=main
USER 0:0
RUN --mount=type=secret,id=HF_TOKEN,env=HF_TOKEN \
    XDG_CACHE_HOME=/tmp/cache robustfeat pull "$MODEL" --revision "$REVISION" --out /models/robustfeat --quiet && \
    rm -r /tmp/cache
USER 65534:65534
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--model", "/models/robustfeat"]

# With the built-in model.
FROM runtime AS serve
