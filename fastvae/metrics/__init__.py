"""Measures of trained models.

disentanglement.py  mutual information gap and modularity of given codes and factors
local.py            the same in small neighbourhoods of the factors, for a model
outliers.py         how well scores tell foreign samples from others
"""

from fastvae.metrics.disentanglement import factor_information, mig, modularity
from fastvae.metrics.local import codes_of, local_codes, local_mig, local_modularity
from fastvae.metrics.outliers import OODMetrics, ood_metrics

__all__ = [
    "OODMetrics",
    "codes_of",
    "factor_information",
    "local_codes",
    "local_mig",
    "local_modularity",
    "mig",
    "modularity",
    "ood_metrics",
]
