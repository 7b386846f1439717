# Adds molmo2_nemo to an NGC NeMo 2.7 image without touching the image's torch, Megatron-core and Transformer Engine.
#   docker build --build-arg BASE_IMAGE=<your NGC NeMo image> -t molmo2_nemo .
ARG BASE_IMAGE
FROM ${BASE_IMAGE}

WORKDIR /opt/molmo2_nemo
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY data_prep data_prep
COPY molmo2_nemo molmo2_nemo
COPY recipes recipes

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Only what the image lacks, each without its dependencies; then the versions of the stack must be what they were before.
RUN stack() { python -m pip list --format=freeze --disable-pip-version-check \
        | grep -i -E '^(torch|megatron-core|transformer-engine|transformer_engine|nemo-toolkit|nemo_toolkit|numpy)(==| @)' \
        | sort; } \
    && stack > /tmp/before \
    && for pair in hydra:hydra-core==1.3.2 omegaconf:omegaconf==2.3.0 webdataset:webdataset==1.0.2 braceexpand:braceexpand \
            av:av lhotse:lhotse==1.33.0 intervaltree:intervaltree ijson:ijson rich:rich safetensors:safetensors \
            tokenizers:tokenizers; do \
        python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('${pair%%:*}') is None)" \
            || python -m pip install --no-cache-dir --no-deps "${pair#*:}"; \
    done \
    && python -m pip install --no-cache-dir --no-deps --no-build-isolation . \
    && stack > /tmp/after \
    && diff /tmp/before /tmp/after \
    && rm /tmp/before /tmp/after

# The versions the package is written for; a wrong base image fails here and not in the first step of training.
RUN python -c "from importlib.metadata import version; \
v = version('nemo-toolkit'); assert v.startswith('2.7'), f'NeMo {v} in the base image, 2.7 is needed'; \
print('NeMo', v, 'torch', version('torch'))" && molmo2 --help > /dev/null

RUN useradd --create-home molmo2
USER molmo2
WORKDIR /home/molmo2
HEALTHCHECK --interval=5m --timeout=1m CMD ["molmo2", "doctor"]
CMD ["molmo2", "--help"]
