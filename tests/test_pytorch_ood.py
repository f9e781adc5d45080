"""The outlier scores under pytorch-ood's users' loops, with the library itself.

It imports torchvision, so it runs where torchvision fits torch: ``make test-pytorch-ood`` runs it in .venv-cuda. The
environment of ``make test`` has neither.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from peers import peer
from test_ood import binary, detectors, model_of
from torch.utils.data import DataLoader, TensorDataset

from fastvae.integrations import pytorch_ood
from fastvae.metrics import ood_metrics
from fastvae.ood import LikelihoodRatio, SelfInfluence

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_ood") is None,
    reason="pytorch-ood is in .venv-cuda: make test-pytorch-ood",
)


def test_pytorch_ood_loop_and_benchmark() -> None:
    """The two loops of pytorch-ood's users: metrics over batches, and a benchmark over data sets."""
    peer("pytorch_ood")
    metrics, benchmark = peer("pytorch_ood.metrics"), peer("pytorch_ood.benchmark")
    pytorch_ood.register()
    pytorch_ood.register()
    model = model_of()
    inside, outside = binary(12), 1 - binary(9)
    x, y = torch.cat([inside, outside]), torch.cat([torch.zeros(12), -torch.ones(9)]).long()
    known = TensorDataset(inside, torch.zeros(12).long())

    class Digits(benchmark.Benchmark):
        ood_names = ("inverted",)

        def train_set(self) -> Any:
            return known

        def test_sets(self, known: bool = True, unknown: bool = True) -> Any:
            return [TensorDataset(x, y)]

    for detector in (
        *detectors(model),
        LikelihoodRatio(model, epochs=1, num_samples=20),
        SelfInfluence(model),
    ):
        assert isinstance(detector, peer("pytorch_ood.api").Detector)
        detector.fit(DataLoader(known, 4))
        found = metrics.OODMetrics()
        for batch, labels in DataLoader(TensorDataset(x, y), 5):
            found.update(detector(batch), labels)
        expected = ood_metrics(detector(inside), detector(outside))
        result = found.compute()
        assert float(result["AUROC"]) == pytest.approx(expected.auroc, abs=1e-6)
        assert float(result["FPR95TPR"]) == pytest.approx(expected.fpr95, abs=1e-6)
        rows = Digits().evaluate(detector, loader_kwargs={"batch_size": 7})
        assert rows[0]["Dataset"] == "inverted" and float(rows[0]["AUROC"]) == pytest.approx(
            expected.auroc, abs=1e-6
        )
