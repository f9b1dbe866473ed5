# The worker in a container. For the CPU:
#
#   docker build -t ai4all-native .
#
# For NVIDIA GPUs (run it with --gpus all):
#
#   docker build -t ai4all-native:cuda \
#     --build-arg BUILD_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#     --build-arg RUN_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 \
#     --build-arg DEFINES="-DAI4ALL_CPU_VARIANTS=ON -DGGML_CUDA=ON" .
#
# Either runs on any x86-64-v2 machine: the kernels that fit its CPU are chosen when it starts.

ARG BUILD_IMAGE=ubuntu:24.04
ARG RUN_IMAGE=ubuntu:24.04

FROM ${BUILD_IMAGE} AS build
ARG DEFINES="-DAI4ALL_CPU_VARIANTS=ON"
# Versions are those of the base image's release; pinning them would only break it when they move.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/ai4all
COPY . /source
RUN CMAKE_ARGS="${DEFINES}" /opt/ai4all/bin/pip install --no-cache-dir /source

FROM ${RUN_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /data --shell /usr/sbin/nologin worker
COPY --from=build /opt/ai4all /opt/ai4all
ENV PATH=/opt/ai4all/bin:$PATH AI4ALL_DATA_DIR=/data
USER 10001
VOLUME /data
# The worker opens no port. On SIGTERM it hands back what it holds and says goodbye.
STOPSIGNAL SIGTERM
ENTRYPOINT ["ai4all-native"]
CMD ["worker"]
