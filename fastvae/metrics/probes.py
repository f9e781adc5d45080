"""How well simple classifiers read labels from codes: k nearest neighbours and a linear one, by scikit-learn."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastvae._distribution import to_mend
from fastvae.arguments import expect, expect_numbers

__all__ = ["knn_accuracy", "linear_probe"]


def knn_accuracy(
    codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor, *, k: int = 10
) -> float:
    """Share of test codes whose label is the most frequent among their k nearest codes (Euclidean distance).

    Args:
        codes: [N, d] floating, such as the means of :func:`posteriors`.
        labels: [N] integers.
        test_codes, test_labels: [M, d] and [M].
        k: neighbours, at most N.

    Returns:
        0 to 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, codes that are not finite, k out of range.
        ImportError: scikit-learn is not installed.
    """
    _check("knn_accuracy", codes, labels, test_codes, test_labels)
    expect_numbers("knn_accuracy", k=k)
    expect(1 <= k <= len(codes), f"knn_accuracy: k: expected 1 to {len(codes)}", k)
    neighbors = _part_of_sklearn("knn_accuracy", "neighbors")
    return _score(neighbors.KNeighborsClassifier(n_neighbors=k), codes, labels, test_codes, test_labels)


def linear_probe(
    codes: Tensor,
    labels: Tensor,
    test_codes: Tensor,
    test_labels: Tensor,
    *,
    penalty: float = 1.0,
    max_iter: int = 1000,
) -> float:
    """Share of test codes whose label multinomial logistic regression on the standardised codes finds.

    Args:
        codes, labels, test_codes, test_labels: see :func:`knn_accuracy`.
        penalty: of the weights' squares; scikit-learn's C is 1 / penalty.
        max_iter: of its solver, whose ConvergenceWarning says when they did not do.

    Returns:
        0 to 1.

    Raises:
        ValueError, ImportError: see :func:`knn_accuracy`; penalty not above 0.
    """
    _check("linear_probe", codes, labels, test_codes, test_labels)
    expect_numbers("linear_probe", penalty=penalty, max_iter=max_iter)
    expect(penalty > 0, "linear_probe: penalty: expected a number above 0", penalty)
    linear_model, pipeline, preprocessing = (
        _part_of_sklearn("linear_probe", part) for part in ("linear_model", "pipeline", "preprocessing")
    )
    classifier = pipeline.make_pipeline(
        preprocessing.StandardScaler(), linear_model.LogisticRegression(C=1 / penalty, max_iter=max_iter)
    )
    return _score(classifier, codes, labels, test_codes, test_labels)


def _part_of_sklearn(measure: str, name: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(f"{measure}: needs scikit-learn; {to_mend('scikit-learn', 'ood')}") from error


def _score(classifier: Any, codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor) -> float:
    arrays = [
        part.detach().cpu().numpy() for part in (codes.double(), labels, test_codes.double(), test_labels)
    ]
    return float(classifier.fit(*arrays[:2]).score(*arrays[2:]))


def _check(name: str, codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor) -> None:
    for role, some, of in (("", codes, labels), ("test_", test_codes, test_labels)):
        expect(
            some.dim() == 2 and some.is_floating_point() and 0 not in some.shape,
            f"{name}: {role}codes: expected floating [N, d], not empty",
            f"{some.dtype} {list(some.shape)}",
        )
        if not bool(torch.isfinite(some).all()):
            raise ValueError(f"{name}: {role}codes: expected finite values")
        expect(
            not of.is_floating_point() and of.shape == some.shape[:1],
            f"{name}: {role}labels: expected integers [{len(some)}]",
            f"{of.dtype} {list(of.shape)}",
        )
    expect(
        codes.shape[1] == test_codes.shape[1],
        f"{name}: test_codes: expected [M, {codes.shape[1]}]",
        list(test_codes.shape),
    )
