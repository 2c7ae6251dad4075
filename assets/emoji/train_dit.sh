#!/usr/bin/env bash
# Train the three bundled DiTs: about 75 minutes on two CPU cores. Each run resumes after a kill.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}

train() { # name, steps, batch, precision
    "$PYTHON" dit/train.py --features-path data/emoji/features --class-balance 0.5 --model "emoji-$1" --max-steps "$2" --global-batch-size "$3" \
        --mixed-precision "$4" --lr 1e-3 --lr-schedule cosine --warmup-steps 200 --adam-betas 0.9 0.99 --snr-gamma 5 --ema-decay 0.999 \
        --results-dir "runs/dit-emoji-$1" --autoresume --export "pretrained_models/emoji/dit-$1.safetensors"
    mkdir -p pretrained_models/emoji/logs
    cp "runs/dit-emoji-$1/log.jsonl" "pretrained_models/emoji/logs/dit-$1.jsonl"
}

train small 3800 128 no
train base 2800 64 bf16
train large 4300 64 bf16
