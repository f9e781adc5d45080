"""The outlier scores of :mod:`fastvae.ood` as detectors of pytorch-ood (Kirchheim et al., CVPR Workshops 2022)."""

from __future__ import annotations

import importlib

from fastvae.integrations import TORCHVISION
from fastvae.ood import Detector

__all__ = ["register"]


def register() -> None:
    """From here on, every ``fastvae.ood`` score is an instance of ``pytorch_ood.api.Detector``.

    The interface is the same without that (``fit``, ``predict``, ``to``, ``requires_fit``, calls; higher = out), and
    pytorch-ood's metrics take any scores; its benchmarks ask for instances. Hyperparameter search
    (``pytorch_ood.utils.GridSearch``) is not covered. Calling it again changes nothing.

    Raises:
        ImportError: pytorch-ood is not installed, or the torchvision that it imports does not fit torch.
    """
    try:
        api = importlib.import_module("pytorch_ood.api")
    except ModuleNotFoundError as error:
        raise ImportError(
            "fastvae.integrations.pytorch_ood: needs pytorch-ood; to mend it: pip install pytorch-ood"
        ) from error
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise ImportError(
            f"fastvae.integrations.pytorch_ood: pytorch-ood {TORCHVISION.format(error=error)}"
        ) from error
    api.Detector.register(Detector)
