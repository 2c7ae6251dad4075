#!/usr/bin/env bash
# Train the text-to-image pair: about three hours on one CPU core. A run that was killed goes on.
# The text encoder learns with the large U-Net; the small one reads it as it then is, so this one comes last. Both learn in two rounds: the second starts from
# the average of the first, with the learning rate at its peak again. The small one's first round read the encoder as the large one's first round had left it.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
SD=pretrained_models/emoji/sd

train() { # size, round, steps, batch, lr, folder to write, further flags
    "$PYTHON" sd/train_text_to_image.py --features-path data/emoji/features --class-balance 0.5 --model "emoji-$1" --max-steps "$3" \
        --global-batch-size "$4" --mixed-precision bf16 --lr "$5" --lr-schedule cosine --warmup-steps 200 --adam-betas 0.9 0.99 --snr-gamma 5 \
        --ema-decay 0.999 --clip-norm 1.0 --vae pretrained_models/emoji/vae --preview-every 1000 --global-seed $(($2 - 1)) \
        --results-dir "runs/sd-$1-$2" --autoresume --ckpt-every 500 --log-every 50 --pipeline "$6" --export "runs/sd-$1-$2.safetensors" "${@:7}"
    cp "runs/sd-$1-$2/log.jsonl" "pretrained_models/emoji/logs/sd-$1-$2.jsonl"
}

rm -rf "$SD" runs/sd-first  # U-Nets there would belong to other text encoders
mkdir -p pretrained_models/emoji/logs
train large 1 6000 64 1e-3 runs/sd-first
train small 1 2500 128 1e-3 runs/sd-first --text-encoder runs/sd-first
train large 2 13000 64 1e-3 "$SD" --init-from runs/sd-large-1.safetensors
train small 2 8000 128 1.5e-3 "$SD" --text-encoder "$SD" --init-from runs/sd-small-1.safetensors
