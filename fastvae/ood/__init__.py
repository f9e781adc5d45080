"""Outlier scores of images under a model. All share one interface: ``fit``, ``predict``, ``to``, higher = out."""

from fastvae.ood.base import Detector
from fastvae.ood.self_influence import SelfInfluence

__all__ = ["Detector", "SelfInfluence"]
