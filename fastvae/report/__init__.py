"""One page on a model and its data: what it makes, what it knows, what shaped it, what it runs on.

choosing.py    which images or rows a page looks at; subject.py: they and the model, how many a section can afford
page.py        sections as one HTML file (page.html) and as text
rows.py        rows of a table in words
pictures.py    samples and reconstructions; evidence.py: bounds and likelihoods; latents.py: codes and traversals
trajectory.py  the flow of a Hamiltonian VAE; foreign.py: outlier scores; influence.py: training images
labels.py      training images whose labels look wrong
speed.py       what runs in kernels, and how fast; setting.py: training, data, versions; wording.py: numbers in words
writing.py     write_report, which puts them together
"""

from fastvae.report.page import Picture, Section, Table, as_text, write_page
from fastvae.report.subject import Subject
from fastvae.report.writing import sections_of, write_report

__all__ = ["Picture", "Section", "Subject", "Table", "as_text", "sections_of", "write_page", "write_report"]
