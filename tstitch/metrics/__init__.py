"""Distances between sets of pictures, in features of whichever network. `python -m tstitch.metrics --help`."""

from tstitch.metrics.frechet import FeatureStatistics, frechet_distance
from tstitch.metrics.scores import InceptionScore, inception_score, precision_recall

__all__ = ["FeatureStatistics", "InceptionScore", "frechet_distance", "inception_score", "precision_recall"]
