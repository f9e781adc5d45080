"""Measures of what a model's codes say about its images.

disentanglement.py  mutual information gap and modularity of given codes and factors
local.py            the same in small neighbourhoods of the factors, for a model
"""

from fastvae.metrics.disentanglement import factor_information, mig, modularity
from fastvae.metrics.local import codes_of, local_codes, local_mig, local_modularity

__all__ = [
    "codes_of",
    "factor_information",
    "local_codes",
    "local_mig",
    "local_modularity",
    "mig",
    "modularity",
]
