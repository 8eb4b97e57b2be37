# slos-serve on vLLM for CPUs. From the repository's root:
#   docker build -f deploy/docker/cpu.Dockerfile -t slos-serve:cpu .
#   docker run --rm -p 8000:8000 --read-only --tmpfs /tmp --shm-size 1g -v slos-serve:/home/slos slos-serve:cpu Qwen/Qwen3-0.6B --enforce-eager
FROM python:3.11-slim-bookworm
# Versions are those of the base image's Debian.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/slos-serve
COPY . .
RUN VENV=/opt/venv scripts/install cpu bench \
    && rm -rf /root/.cache \
    && useradd --create-home --uid 10001 slos
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/home/slos/models NUMBA_CACHE_DIR=/home/slos/numba PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /home/slos
# Profiles, models and compiled code: what the server writes is below here and in /tmp.
VOLUME /home/slos
EXPOSE 8000
ENTRYPOINT ["slos-serve", "serve"]
