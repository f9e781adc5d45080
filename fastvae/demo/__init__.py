"""The demonstration: models trained side by side on images that are there, and the report on the best known of them.

training.py     models that start alike, trained for as many steps each within a time
comparisons.py  Hamiltonian VAE against VAE, with and without the Jacobian penalty and consistency: a section each
running.py      from images to the page
"""

from fastvae.demo.command import add_arguments, run

__all__ = ["add_arguments", "run"]
