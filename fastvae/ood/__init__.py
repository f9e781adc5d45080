"""Outlier scores of images under a model. All share one interface: ``fit``, ``predict``, ``to``, higher = out."""

from fastvae.ood.base import Detector
from fastvae.ood.likelihood_regret import LikelihoodRegret, Refit
from fastvae.ood.self_influence import SelfInfluence

__all__ = ["Detector", "LikelihoodRegret", "Refit", "SelfInfluence"]
