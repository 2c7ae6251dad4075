#!/usr/bin/env bash
# Train the three bundled DiTs: about four hours on two CPU cores. Each run resumes after a kill.
# Two rounds of cosine decay each: the second starts from the moving average that the first exported.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}

train() { # run (model and round), steps, batch, precision, export, further flags
    local run="dit-$1"
    "$PYTHON" dit/train.py --features-path data/emoji/features --class-balance 0.5 --model "emoji-${1%-*}" --max-steps "$2" --global-batch-size "$3" \
        --mixed-precision "$4" --lr 1e-3 --lr-schedule cosine --warmup-steps 200 --adam-betas 0.9 0.99 --snr-gamma 5 --ema-decay 0.999 --clip-norm 1.0 \
        --results-dir "runs/$run" --autoresume --ckpt-every 500 --log-every 50 --export "$5" "${@:6}"
    mkdir -p pretrained_models/emoji/logs
    cp "runs/$run/log.jsonl" "pretrained_models/emoji/logs/$run.jsonl"
}

rounds() { # model, first round: steps, batch, precision; second round: steps
    train "$1-1" "$2" "$3" "$4" "runs/dit-$1-1/average.safetensors"
    train "$1-2" "$5" "$3" bf16 "pretrained_models/emoji/dit-$1.safetensors" --init-from "runs/dit-$1-1/average.safetensors" --global-seed 1
}

rounds small 3800 128 no 6000
rounds base 2800 64 bf16 4500
rounds large 4300 64 bf16 6000
