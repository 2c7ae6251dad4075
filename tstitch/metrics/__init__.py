"""Distances between sets of pictures."""

from tstitch.metrics.frechet import FeatureStatistics, frechet_distance

__all__ = ["FeatureStatistics", "frechet_distance"]
