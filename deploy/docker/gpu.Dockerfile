# slos-serve on vLLM's own image for NVIDIA GPUs. From the repository's root:
#   docker build -f deploy/docker/gpu.Dockerfile -t slos-serve:gpu .
#   docker run --rm --gpus all -p 8000:8000 --read-only --tmpfs /tmp --shm-size 8g -v slos-serve:/home/slos slos-serve:gpu Qwen/Qwen3-8B
ARG VLLM=v0.29.0
FROM vllm/vllm-openai:${VLLM}
COPY . /opt/slos-serve
# Nothing of the image's own environment is changed: what slos-serve imports is there already.
RUN python3 -m pip install --no-cache-dir --no-deps /opt/slos-serve \
    && useradd --create-home --uid 10001 slos
ENV HF_HOME=/home/slos/models NUMBA_CACHE_DIR=/home/slos/numba PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /home/slos
# Profiles, models and compiled code: what the server writes is below here and in /tmp.
VOLUME /home/slos
EXPOSE 8000
ENTRYPOINT ["slos-serve", "serve"]
