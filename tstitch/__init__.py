"""T-Stitch: let a small diffusion model take the noisy part of the trajectory and a large one the rest."""
