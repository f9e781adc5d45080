"""A Hamiltonian VAE with its default arguments on every example of docs/other-data.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fastvae

PAGE = Path(__file__).resolve().parent.parent / "docs" / "other-data.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_hamiltonian_vaes_train_on_counts_series_colours_labels_and_torn_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sklearn")
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S))
    assert code.count("fastvae.VAE(") == 5
    code = (
        code.replace("fastvae.VAE(", "fastvae.HVAE(")
        .replace("epochs=40", "epochs=6")
        .replace("epochs=20", "epochs=6")
    )
    # Its gradients are materialised, which the page does not show.
    code = code.replace("condition=1, num_samples=4", "condition=1, num_samples=4, uncovered='materialise'")
    code = code.replace("TracIn(model, (x, labels)", "TracIn(model, (x[:50], labels[:50])")
    histories: list[Any] = []

    def fit(model: Any, *args: Any, **options: Any) -> Any:
        assert type(model) is fastvae.HVAE and model.on_divergence == "raise"
        histories.append(real(model, *args, **options))
        return histories[-1]

    real = fastvae.fit
    monkeypatch.setattr(fastvae, "fit", fit)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    assert len(histories) == 6
    for history in histories:
        assert history.train_loss[-1] < history.train_loss[0] - 5
