"""The U-Net backbone: CompVis latent diffusion checkpoints on diffusers' networks, LDM's schedule, stitched sampling."""
