# syntax=docker/dockerfile:1
# `robustfeat train`, evaluate and export on NVIDIA GPUs or processors; docs/deploy.md has the commands.

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
WORKDIR /src
COPY docker/locks/train.txt docker/locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/robustfeat && \
    /opt/robustfeat/bin/pip install --require-hashes --only-binary=:all: -r docker/locks/train.txt
COPY --from=wheel /wheel/ /wheel/
RUN /opt/robustfeat/bin/pip install --no-index --no-deps /wheel/*.whl

FROM python:3.13-slim-trixie AS train
COPY --from=environment /opt/robustfeat /opt/robustfeat
ENV PATH=/opt/robustfeat/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    ORT_DISABLE_TELEMETRY=1
# Datasets and runs are mounted here.
WORKDIR /work
USER 65534:65534
ENTRYPOINT ["robustfeat"]
CMD ["train", "--help"]
