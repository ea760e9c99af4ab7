# megatron_vico on NVIDIA's PyTorch image, which brings torch, CUDA, NCCL and TransformerEngine that fit each other.
#
#   docker build -t megatron_vico .
#   docker run --rm --gpus all --ipc host megatron_vico vico doctor
#   docker run --rm --gpus all --ipc host megatron_vico python -m tests.gpu --minutes 8
#
# Never built where this was written; tests/unit/test_package.py checks what it copies and installs.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}

# What a rank says last must not stay in a buffer.
ENV PYTHONUNBUFFERED=1

WORKDIR /opt/megatron_vico
COPY setup.py pyproject.toml README.md LICENSE Makefile ./
COPY megatron_vico megatron_vico
COPY examples examples
COPY tools tools
COPY benchmarks benchmarks
COPY tests tests

# Torch and TransformerEngine stay the image's: what is there satisfies setup.py, and its own
# constraints (PIP_CONSTRAINT) keep pip from replacing it. Editable: recipes and checks lie beside the package.
RUN pip install --no-cache-dir --no-build-isolation --editable '.[video,wandb]' \
    && python -c "import torch, transformer_engine.pytorch" \
    && vico --version

CMD ["vico", "doctor"]
