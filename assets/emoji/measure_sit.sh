#!/usr/bin/env bash
# Measure FD-emoji of the bundled SiTs for sit/README.md: three quarters of an hour on two CPU cores. A sweep that was killed goes on.
# The two fronts that it draws, ratio by ratio, are those of python experiments/run.py --only sit-front.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
EMOJI=pretrained_models/emoji

sweep() { # name of the results, flags
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 sit/sweep_emoji.py --dtype bf16 --num-images 1000 "${@:2}" --out "$1.json" --work-dir "runs/$(basename "$1")"
}

# A DiT as the small model, in 20 evaluations of an ODE.
sweep benchmarks/results/sit_bridge ODE --sampling-method heun2 --num-sampling-steps 11 --s_ckpt "$EMOJI/dit-small.safetensors"
# By the number of evaluations. Rounding in bf16 would look rough to an adaptive method.
sweep benchmarks/results/sit_heun2_6 ODE --sampling-method heun2 --num-sampling-steps 6 --ratios 0 0.5 1
sweep benchmarks/results/sit_sde_11 SDE --num-sampling-steps 11 --ratios 0 0.5 1
sweep benchmarks/results/sit_heun2_21 ODE --sampling-method heun2 --num-sampling-steps 21 --ratios 0 0.5 1
sweep benchmarks/results/sit_dopri5 ODE --ratios 0 0.5 1 --dtype fp32

"$PYTHON" sit/plot_sweeps.py "$EMOJI"/sit_results_*.json benchmarks/results/sit_bridge.json --out "$EMOJI/sit_results.png"
"$PYTHON" sit/plot_sweeps.py "$EMOJI"/sit_results_{ode,sde}.json benchmarks/results/sit_{heun2,sde,dopri5}*.json --x evaluations --out assets/figures/sit_evaluations.png
