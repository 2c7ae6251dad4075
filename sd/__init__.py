"""Stable Diffusion and SDXL: stitching of any diffusers pipeline, demos, the web page, training of small U-Nets."""

from tstitch.torchvision_compat import prepare_torchvision

prepare_torchvision()  # diffusers imports torchvision where it is installed
