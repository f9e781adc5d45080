"""Pictures of trained models, as matplotlib figures that stay readable at the width of a phone.

Each function takes a fastvae model (of which it draws from a private copy, in eval mode) or tensors that were computed
elsewhere, and returns a ``matplotlib.figure.Figure``: ``figure.savefig("samples.png")``, or a notebook shows it.
Nothing touches pyplot's global state, and no display is needed.

drawing.py       sizes, colours, axes; images.py: images in blocks
models.py        samples, reconstructions; latents.py: traversals, columns of the Jacobian, codes
tables.py        columns of samples and data, values and reconstructions, effects of latents
trajectories.py  energies of leapfrog trajectories; scores.py: histograms with ROC curves
influence.py     training samples beside what they shaped; training.py: training curves
"""

from fastvae.plot.drawing import png
from fastvae.plot.images import image_blocks
from fastvae.plot.influence import influences
from fastvae.plot.latents import jacobian_columns, latent_scatter, traversals
from fastvae.plot.models import reconstructions, samples
from fastvae.plot.scores import score_histograms
from fastvae.plot.tables import column_effects, column_moments, reconstructed_values
from fastvae.plot.training import training_curves
from fastvae.plot.trajectories import energies

__all__ = [
    "column_effects",
    "column_moments",
    "energies",
    "image_blocks",
    "influences",
    "jacobian_columns",
    "latent_scatter",
    "png",
    "reconstructed_values",
    "reconstructions",
    "samples",
    "score_histograms",
    "training_curves",
    "traversals",
]
