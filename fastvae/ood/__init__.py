"""Outlier scores of images under a model. All share one interface: ``fit``, ``predict``, ``to``, higher = out."""

from fastvae.ood.base import Detector
from fastvae.ood.input_complexity import InputComplexity, compressed_bits
from fastvae.ood.likelihood_ratio import LikelihoodRatio, MutatedImages, mutate
from fastvae.ood.likelihood_regret import LikelihoodRegret, Refit
from fastvae.ood.negative_log_likelihood import NegativeLogLikelihood
from fastvae.ood.self_influence import SelfInfluence

__all__ = [
    "Detector",
    "InputComplexity",
    "LikelihoodRatio",
    "LikelihoodRegret",
    "MutatedImages",
    "NegativeLogLikelihood",
    "Refit",
    "SelfInfluence",
    "compressed_bits",
    "mutate",
]
