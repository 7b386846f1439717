# Adds molmo2_nemo to an NGC NeMo image from 26.02 on, without touching anything that the image has. Where the image has no
# NeMo 2.7, or another transformers, those come in a folder that only the command `molmo2` looks into.
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

# Refuses a base that cannot work, and ends with an error if anything of the image's is not what it was.
RUN python requirements/overlay.py /opt/molmo2_nemo/overlay
ENV PATH=/opt/molmo2_nemo/overlay/bin:${PATH}

# The stack that will run, and its versions: a wrong base image fails here, and not in the first step of training.
RUN molmo2 doctor && molmo2 --help > /dev/null

RUN useradd --create-home --uid 10001 molmo2
USER 10001
WORKDIR /home/molmo2
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m CMD ["molmo2", "doctor"]
CMD ["molmo2", "--help"]
