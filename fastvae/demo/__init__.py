"""The demonstration: models side by side on real images, and a report of the run.

problem.py      the images, and the networks that suit them
experiment.py   training and scores: everything the report is made from
influence.py    training images that shaped held-out ones
training.py     models trained in turns; penalty.py: the pairs with and without the Jacobian penalty
timing.py       time per step
trajectory.py   energies along trajectories; latents.py: traversals and columns of the Jacobian
sections.py     the report's sections; to add one, append a function to SECTIONS
figures.py      pictures as PNG
report.py       sections as HTML and as text
"""

from fastvae.demo.command import DemoError, add_arguments, run

__all__ = ["DemoError", "add_arguments", "run"]
