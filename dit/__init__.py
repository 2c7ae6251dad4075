"""The DiT backbone: models, training and sampling scripts."""
