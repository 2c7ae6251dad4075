#!/usr/bin/env bash
# Measure FD-emoji of the bundled U-Nets for ldm/README.md: half an hour on two CPU cores. A sweep that was killed goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
EMOJI=pretrained_models/emoji

sweep() { # name of the results, flags
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 ldm/scripts/sweep_emoji.py --dtype bf16 --num-images 1000 "${@:2}" --out "$1.json" --work-dir "runs/$(basename "$1")"
}

# Ratio by ratio: DDIM, 20 steps. The seconds are of sampling on one thread.
sweep "$EMOJI/ldm_results"
# By solver and number of steps.
sweep benchmarks/results/ldm_dpm_10 --solver dpm++ --num-sampling-steps 10 --ratios 0 0.5 1
sweep benchmarks/results/ldm_plms_20 --solver plms --ratios 0 0.5 1
sweep benchmarks/results/ldm_eta1_50 --ddim_eta 1 --num-sampling-steps 50 --ratios 0 0.5 1
