#!/usr/bin/env bash
# Train the two bundled SiTs: about an hour and a half on two CPU cores, one each. A run that was killed goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

train() { # size, steps, batch
    "$PYTHON" sit/train.py --features-path data/emoji/features --class-balance 0.5 --model "emoji-$1" --max-steps "$2" --global-batch-size "$3" \
        --mixed-precision bf16 --lr 1e-3 --lr-schedule cosine --warmup-steps 200 --adam-betas 0.9 0.99 --ema-decay 0.999 --clip-norm 1.0 \
        --results-dir "runs/sit-$1" --autoresume --ckpt-every 500 --log-every 50 --export "pretrained_models/emoji/sit-$1.safetensors"
    mkdir -p pretrained_models/emoji/logs
    cp "runs/sit-$1/log.jsonl" "pretrained_models/emoji/logs/sit-$1.jsonl"
}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT  # where one fails, the other stops too
train small 9000 128 &
train large 9000 64 &
wait -n && wait -n
