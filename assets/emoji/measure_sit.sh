#!/usr/bin/env bash
# Measure FD-emoji of the bundled SiTs for sit/README.md: about 40 minutes on two CPU cores. A sweep that was killed goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
EMOJI=pretrained_models/emoji

sweep() { # name of the results, flags
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 sit/sweep_emoji.py --dtype bf16 "${@:2}" --out "$1.json" --work-dir "runs/$(basename "$1")"
}

# Ratio by ratio: 20 evaluations of an ODE, 21 of an SDE, and a DiT as the small model.
sweep "$EMOJI/sit_results_ode" ODE --sampling-method heun2 --num-sampling-steps 11 --num-images 2000
sweep "$EMOJI/sit_results_sde" SDE --num-sampling-steps 21 --num-images 2000
sweep benchmarks/results/sit_bridge ODE --sampling-method heun2 --num-sampling-steps 11 --num-images 2000 --s_ckpt "$EMOJI/dit-small.safetensors"
# By the number of evaluations.
FEW="--num-images 1000 --ratios 0 0.3 0.5 1"
for steps in 6 11 21; do
    sweep "benchmarks/results/sit_heun2_$steps" ODE --sampling-method heun2 --num-sampling-steps "$steps" $FEW
done
for steps in 11 21 51; do
    sweep "benchmarks/results/sit_sde_$steps" SDE --num-sampling-steps "$steps" $FEW
done
sweep benchmarks/results/sit_dopri5 ODE $FEW --dtype fp32  # rounding in bf16 would look rough to an adaptive method

"$PYTHON" sit/plot_sweeps.py "$EMOJI"/sit_results_*.json benchmarks/results/sit_bridge.json --out "$EMOJI/sit_results.png"
"$PYTHON" sit/plot_sweeps.py benchmarks/results/sit_{heun2,sde,dopri5}*.json --x evaluations --out assets/figures/sit_evaluations.png
