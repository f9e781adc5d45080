"""The command line: ``fastvae train``, ``score``, ``report``, ``demo``, ``info``.

errors.py  what a caller has to mend, and what ends a command
runs.py    a run's folder: its settings, its model, its data
train.py   from images or a table to a trained model; models.py: which one
score.py   a number for each image or row
report.py  a page about a model and its images or rows
"""

from fastvae.commands.errors import CommandError

__all__ = ["CommandError"]
