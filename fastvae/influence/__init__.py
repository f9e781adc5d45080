"""Which training samples shaped an output: TracIn over every parameter, without per-sample gradients.

tracin.py       TracIn: what people call
engine.py       the factors of a batch's gradients, from one batched forward and backward pass
sweeps.py       the factors that kernels hand out; read_sweeps.py: of decoders that are read and swept in PyTorch
uses.py         how such a decoder uses its parameters; layouts.py: where its values have the samples
rules.py        how each kind of layer makes its gradient from its input and output gradient
factors.py      dot products from factors, by the cheaper exact route
evaluation.py   per-sample losses over several draws of noise; noise.py: noise of any module
snapshots.py    checkpoints; batches.py: tiles of the training set; sharding.py: processes; topk.py: results
audit.py        the comparison with autograd that comes before any score
coverage.py     which parameter goes by which rule
"""

from fastvae.influence.coverage import Coverage, UncoveredParameter
from fastvae.influence.topk import KMostInfluentialResults
from fastvae.influence.tracin import InfluenceWithError, TracIn

__all__ = ["Coverage", "InfluenceWithError", "KMostInfluentialResults", "TracIn", "UncoveredParameter"]
