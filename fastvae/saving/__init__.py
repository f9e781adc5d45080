"""Models in a folder: their settings as JSON, their weights as safetensors. Nothing in it is ever executed.

folder.py    ``load``, ``save``: the files, whole or not at all
settings.py  what a model was made from, as plain values, and back
"""

from fastvae.saving.folder import load, save

__all__ = ["load", "save"]
