#!/usr/bin/env bash
# Train the text-to-image pair: about 50 minutes on one CPU core. A run that was killed goes on.
# The text encoder learns with the large U-Net; the small one reads it as it then is, so this one comes second.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
SD=pretrained_models/emoji/sd

train() { # size, steps, batch, further flags
    "$PYTHON" sd/train_text_to_image.py --features-path data/emoji/features --class-balance 0.5 --model "emoji-$1" --max-steps "$2" \
        --global-batch-size "$3" --mixed-precision bf16 --lr 1e-3 --lr-schedule cosine --warmup-steps 200 --adam-betas 0.9 0.99 --snr-gamma 5 \
        --ema-decay 0.999 --clip-norm 1.0 --vae pretrained_models/emoji/vae --preview-every 1000 \
        --results-dir "runs/sd-$1" --autoresume --ckpt-every 500 --log-every 50 --pipeline "$SD" "${@:4}"
    mkdir -p pretrained_models/emoji/logs
    cp "runs/sd-$1/log.jsonl" "pretrained_models/emoji/logs/sd-$1.jsonl"
}

rm -rf "$SD"  # the small U-Net there would belong to another text encoder
train large 6000 64
train small 2500 128 --text-encoder "$SD"
