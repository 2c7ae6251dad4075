"""The scripts that sample stitched U-Nets."""
