"""Distances between sets of pictures, in features of whichever network."""

from tstitch.metrics.frechet import FeatureStatistics, frechet_distance
from tstitch.metrics.scores import inception_score, precision_recall

__all__ = ["FeatureStatistics", "frechet_distance", "inception_score", "precision_recall"]
