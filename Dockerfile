# Two images: the converter (the default), and everything, for GPUs.
#
#     docker build -t nanotron-fast .
#     docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" nanotron-fast convert hf nanotron
#
#     docker build -t nanotron-fast-gpu --target gpu .
#     docker run --rm --gpus all --ipc host -v "$PWD:/data" nanotron-fast-gpu train train.yaml

FROM python:3.13-slim AS compiler
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .

FROM compiler AS wheel
RUN NANOTRON_FAST_CUDA=0 pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# The packer for GPUs, compiled by nvcc as Python packages have it: no GPU is needed here.
FROM compiler AS gpu-wheel
RUN pip install --no-cache-dir --target /opt/cuda 'nvidia-cuda-nvcc>=13,<14'
RUN CUDA_HOME=/opt/cuda/nvidia/cu13 NANOTRON_FAST_CUDA=1 NANOTRON_FAST_CUDA_ARCHS="80;90;100" \
    pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim AS gpu
# Triton compiles a few lines of C for each kernel.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=gpu-wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[all]"
WORKDIR /data
ENTRYPOINT ["nanotron-fast"]

FROM python:3.13-slim AS converter
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[s3]"
# Where a user without a name may keep what comes from the Hub.
ENV HF_HOME=/tmp/huggingface
WORKDIR /data
ENTRYPOINT ["nanotron-fast"]
