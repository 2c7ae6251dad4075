# DiT, SiT and Stable Diffusion on an NVIDIA GPU (LDM runs in it too; without a GPU all of them do).
#
#   docker build -t t-stitch .
#   mkdir -p figures && docker run --rm -v "$PWD/figures:/workspace/figures" t-stitch                       # make demo
#   docker run --rm --gpus all --ipc host -v /path/to/data:/data -v hf-cache:/workspace/.cache/huggingface t-stitch \
#       .venv/bin/python dit/sample_t_stitch.py --all_tradeoffs --s_ckpt /data/dit_s_256.pt --xl_ckpt /data/dit_xl_256.pt --save_dir /data/figures
#   docker run --rm --gpus all -p 7860:7860 -v hf-cache:/workspace/.cache/huggingface t-stitch .venv/bin/python sd/gradio_demo.py --host 0.0.0.0
#
# What is written to a mounted folder belongs to user 1000; pass --user "$(id -u)" for another. torch's own wheel brings CUDA's libraries, so the base image
# is NVIDIA's smallest. It asks the host for a driver of CUDA 13; Dockerfile.ldm asks for none.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04

# Ubuntu's own user has number 1000 already. The compiler is for --compile.
# Mirrors drop the exact version of a package within weeks, so none is named here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && useradd --uid 1000 --create-home --home-dir /workspace tstitch \
    && install --directory --owner tstitch /data /workspace/.cache /workspace/.cache/huggingface

USER 1000
WORKDIR /workspace
ENV HF_HOME=/workspace/.cache/huggingface PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# The packages first: this layer is kept until one of these two files changes.
COPY --chown=1000 Makefile requirements.txt ./
RUN make .venv/.installed

COPY --chown=1000 LICENSE.txt *.md pyproject.toml ./
COPY --chown=1000 pretrained_models/readme.txt pretrained_models/readme.txt
COPY --chown=1000 pretrained_models/emoji pretrained_models/emoji
COPY --chown=1000 assets assets
COPY --chown=1000 benchmarks benchmarks
COPY --chown=1000 experiments experiments
COPY --chown=1000 tests tests
COPY --chown=1000 tstitch tstitch
COPY --chown=1000 dit dit
COPY --chown=1000 sit sit
COPY --chown=1000 ldm ldm
COPY --chown=1000 sd sd

VOLUME ["/data", "/workspace/.cache/huggingface"]
CMD ["make", "demo"]
