#!/usr/bin/env bash
# Train the two bundled U-Nets: about an hour and a quarter on two CPU cores, one each. A run that was killed goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

train() { # size
    "$PYTHON" ldm/main.py --base "ldm/configs/emoji-$1.yaml" -t --run-dir "runs/ldm-$1" --export "pretrained_models/emoji/ldm-$1.safetensors"
    mkdir -p pretrained_models/emoji/logs
    cp "runs/ldm-$1/log.jsonl" "pretrained_models/emoji/logs/ldm-$1.jsonl"
}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT  # where one fails, the other stops too
train small &
train large &
wait -n && wait -n
