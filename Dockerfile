# Adds molmo2_nemo to an NGC NeMo 2.7 image without touching the image's torch, Megatron-core and Transformer Engine.
#   docker build --build-arg BASE_IMAGE=<your NGC NeMo image> -t molmo2_nemo .
ARG BASE_IMAGE
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/molmo2_nemo
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY conf conf
COPY data_prep data_prep
COPY molmo2_nemo molmo2_nemo
COPY recipes recipes

# Only what the image lacks, without dependencies of its own; then the stack must be what it was before.
# PIP_BREAK_SYSTEM_PACKAGES: the image is the environment, there is no other system in it.
RUN export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    && stack() { python -m pip list --format=freeze \
        | grep -i -E '^(torch|megatron[-_]core|transformer[-_]engine|nemo[-_]toolkit|flash[-_]attn|numpy)(==| @)' | sort; } \
    && stack > /tmp/before \
    && python requirements/lacking.py > /tmp/lacking.txt \
    && python -m pip install --no-deps --requirement /tmp/lacking.txt \
    && python -m pip install --no-deps --no-build-isolation . \
    && stack > /tmp/after \
    && diff /tmp/before /tmp/after \
    && rm -rf /tmp/before /tmp/after /tmp/lacking.txt build ./*.egg-info

# The versions that the package relies on: a wrong base image fails here, and not in the first step of training.
RUN molmo2 doctor && molmo2 --help > /dev/null

RUN useradd --create-home --uid 10001 molmo2
USER 10001
WORKDIR /home/molmo2
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m CMD ["molmo2", "doctor"]
CMD ["molmo2", "--help"]
