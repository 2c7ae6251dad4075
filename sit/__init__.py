"""SiT: the same transformer as a flow; training, sampling and stitching along ordinary and stochastic differential equations."""
