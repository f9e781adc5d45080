"""Terms of the training loss: pass them to a model as ``penalties=[...]``.

annealing.py    ramps of weights, and of a model's beta
free_bits.py    what a latent variable may carry at no cost
consistency.py  consistency between the codes of an image and of a random view of it
jacobian_l1.py  the Jacobian L1 penalty
"""

from fastvae.penalties.annealing import AnnealedPenalty, BetaAnnealing
from fastvae.penalties.consistency import Consistency
from fastvae.penalties.free_bits import FreeBits
from fastvae.penalties.jacobian_l1 import JacobianL1

__all__ = ["AnnealedPenalty", "BetaAnnealing", "Consistency", "FreeBits", "JacobianL1"]
