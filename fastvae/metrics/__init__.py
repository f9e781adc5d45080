"""Measures of trained models: what their codes say about images, and their evidence.

annealing.py        chains from an initial density to a posterior, and back
disentanglement.py  mutual information gap and modularity of given codes and factors
evidence.py         log p(x) by annealed importance sampling, and bounds from both sides
local.py            the same in small neighbourhoods of the factors, for a model
outliers.py         how well scores tell foreign samples from others
posteriors.py       negative log-likelihood, mutual information, active units, divergence by latent of a model
probes.py           labels read from codes by nearest neighbours and by a linear classifier
"""

from fastvae.metrics.disentanglement import factor_information, mig, modularity
from fastvae.metrics.evidence import AISBounds, AISEstimate, ais, bidirectional_ais
from fastvae.metrics.local import codes_of, local_codes, local_mig, local_modularity
from fastvae.metrics.outliers import OODMetrics, ood_metrics
from fastvae.metrics.posteriors import (
    Estimate,
    active_units,
    divergence_by_latent,
    mutual_information,
    negative_log_likelihood,
    posteriors,
)
from fastvae.metrics.probes import knn_accuracy, linear_probe

__all__ = [
    "AISBounds",
    "AISEstimate",
    "Estimate",
    "OODMetrics",
    "active_units",
    "ais",
    "bidirectional_ais",
    "codes_of",
    "divergence_by_latent",
    "factor_information",
    "knn_accuracy",
    "linear_probe",
    "local_codes",
    "local_mig",
    "local_modularity",
    "mig",
    "modularity",
    "mutual_information",
    "negative_log_likelihood",
    "ood_metrics",
    "posteriors",
]
