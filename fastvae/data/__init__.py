"""Data sets for training: images and tables in memory, files, generated images with known factors, binarisation.

Nothing is downloaded. DATA.md says where the usual files come from and under which licence.
"""

from fastvae.data.augmentation import ColorJitter, Compose, RandomAffine, RandomFlip, accepts_generator
from fastvae.data.factors import FactorDataset, FactorSpace
from fastvae.data.files import load
from fastvae.data.generated import shapes, three_dots
from fastvae.data.images import ImageDataset, binarize, collate_binarized, condition_of, images_of
from fastvae.data.tables import TableDataset, load_table

__all__ = [
    "ColorJitter",
    "Compose",
    "FactorDataset",
    "FactorSpace",
    "ImageDataset",
    "RandomAffine",
    "RandomFlip",
    "TableDataset",
    "accepts_generator",
    "binarize",
    "collate_binarized",
    "condition_of",
    "images_of",
    "load",
    "load_table",
    "shapes",
    "three_dots",
]
