# finetune with the tested versions in an image, for the CPU or for NVIDIA GPUs:
#
#   docker build -t finetune .                                  CPU
#   docker build -t finetune:cuda --build-arg DEVICE=cuda .     GPU, with the compiler that DeepSpeed's ops need
#
#   docker run --rm --user "$(id -u)" -v "$PWD:/workspace" finetune check recipe.yaml
#   docker run --rm --user "$(id -u)" -v "$PWD:/workspace" --gpus all --ipc host finetune:cuda \
#       train recipe.yaml --launch /opt/finetune/accelerate_configs/single_gpu.yaml
#
# --ipc host: ranks exchange through shared memory, of which a container has 64 MB.
ARG DEVICE=cpu

FROM python:3.12-slim-bookworm AS cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ libaio-dev && rm -rf /var/lib/apt/lists/*

# torch's CUDA wheels are built with CUDA 13; DeepSpeed compiles with the same major version.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends g++ libaio-dev python3-dev python3-venv && rm -rf /var/lib/apt/lists/*

FROM ${DEVICE}
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/finetune
# The dependencies alone: a layer that a change of the code leaves as it is.
COPY pyproject.toml setup.cfg constraints.txt README.md LICENSE ./
COPY finetune/__init__.py finetune/
RUN pip install . -c constraints.txt
COPY . .
RUN pip install --no-deps -e .

# Any user may run it: caches go to a home that all may write, and libraries that ask for a user's name find one.
ENV HOME=/home/finetune USER=finetune TORCH_EXTENSIONS_DIR=/home/finetune/torch_extensions
RUN useradd --uid 10001 --create-home finetune && chmod 1777 /home/finetune
USER finetune
WORKDIR /workspace
ENTRYPOINT ["finetune"]
CMD ["--help"]
