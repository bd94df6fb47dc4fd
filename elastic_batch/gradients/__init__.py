"""Sums of gradients over an update."""

from elastic_batch.gradients.sums import GradientSums, Sums

__all__ = ["GradientSums", "Sums"]
