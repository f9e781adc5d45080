"""Terms of the training loss: pass them to a model as ``penalties=[...]``.

annealing.py    ramps of weights, and of a model's beta
free_bits.py    what a latent variable may carry at no cost
consistency.py  consistency between the codes of an image and of a random view of it
jacobian_l1.py  the Jacobian L1 penalty
models.py       VAEs with the penalty of their paper
"""

from fastvae.penalties.annealing import AnnealedPenalty, BetaAnnealing
from fastvae.penalties.consistency import Consistency
from fastvae.penalties.free_bits import FreeBits
from fastvae.penalties.jacobian_l1 import JacobianL1
from fastvae.penalties.models import ConsistencyVAE, JacobianL1VAE

__all__ = [
    "AnnealedPenalty",
    "BetaAnnealing",
    "Consistency",
    "ConsistencyVAE",
    "FreeBits",
    "JacobianL1",
    "JacobianL1VAE",
]
