"""What needs an optional package says which, and how to get it, in an environment that does not have it."""

from __future__ import annotations

from pathlib import Path

import pytest
from environments import PACKAGE, Environment

OPTIONAL = ("sklearn", "scikit-learn", "tqdm", "PIL", "pillow", "matplotlib", "safetensors", "pytorch-ood")
SCRIPT = """
import pathlib
import torch
from torch import nn
import fastvae
from fastvae.__main__ import main
from fastvae.influence import TracIn
from fastvae.integrations import pytorch_ood

model = fastvae.VAE(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), nn.Linear(2, 4))
x = torch.zeros(3, 4)
pathlib.Path("a.png").touch()
labels = torch.arange(3) % 2
metrics = fastvae.metrics
tracin = TracIn(model, x, [None], lambda model, checkpoint: 1.0)
regret = fastvae.ood.LikelihoodRegret(model, num_steps=1, num_samples=1)
calls = {
    "scikit-learn demo load": lambda: fastvae.data.load("digits"),
    "scikit-learn ood ood_metrics": lambda: metrics.ood_metrics(x[0], x[1]),
    "scikit-learn ood knn_accuracy": lambda: metrics.knn_accuracy(x, labels, x, labels, k=1),
    "scikit-learn ood linear_probe": lambda: metrics.linear_probe(x, labels, x, labels),
    "safetensors influence TracIn": lambda: TracIn(
        model, x, [None], lambda model, checkpoint: 1.0, cache_dir="cache"
    ),
    "tqdm - TracIn": lambda: tracin.influence(x, show_progress=True),
    "tqdm - LikelihoodRegret": lambda: regret.predict(x, show_progress=True),
    "tqdm - ais": lambda: metrics.ais(model, x, 5, 2, show_progress=True),
    "pillow ood InputComplexity": lambda: fastvae.ood.InputComplexity(model),
    "pillow - load": lambda: fastvae.data.load("a.png"),
    "safetensors - save": lambda: model.save("folder"),
}
for name, call in calls.items():
    package, extra, start = name.split()
    try:
        call()
    except ImportError as error:
        expected = f"to mend it: pip install {package}"
        if extra != "-":  # what comes with fastvae has none
            expected += f' (or, in a checkout of fastvae: pip install ".[{extra}]")'
        assert str(error).startswith(start) and str(error).endswith(expected), error
    else:
        raise AssertionError(name)
try:
    pytorch_ood.register()
except ImportError as error:
    assert str(error).endswith("needs pytorch-ood; to mend it: pip install pytorch-ood"), error
else:
    raise AssertionError("register")
assert main(["info"]) == 0
raise SystemExit(main(["demo"]))
"""


def test_every_optional_package(tmp_path: Path) -> None:
    result = Environment(tmp_path / "env", *OPTIONAL).run("-c", SCRIPT, path=PACKAGE.parent, cwd=tmp_path)
    assert result.returncode == 2, result.stderr  # the demo's
    assert (
        "needs matplotlib and tqdm and pillow; to mend it: pip install matplotlib tqdm pillow (or,"
        in result.stderr
    )
    assert (
        "not installed; to mend it: pip install scikit-learn (or, in a checkout of fastvae" in result.stdout
    )


@pytest.mark.slow
def test_the_demo_without_its_images(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "env", "sklearn", "scikit-learn")
    result = environment.run("-m", "fastvae", "demo", path=PACKAGE.parent, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "fastvae demo: error: " in result.stderr and 'pip install ".[demo]"' in result.stderr


def test_a_torchvision_that_does_not_fit(tmp_path: Path) -> None:
    """What import does in Lightning and pytorch-ood when torchvision is built for CUDA and torch is not."""
    environment = Environment(tmp_path / "env", "lightning", "pytorch-ood")
    for name in ("lightning", "pytorch_ood"):
        module = environment.packages / f"{name}.py"
        module.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    script = """
from fastvae.integrations import pytorch_ood
for use in (pytorch_ood.register, lambda: __import__("fastvae.integrations.lightning")):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    result = environment.run("-c", script, path=PACKAGE.parent, cwd=tmp_path)
    said = result.stdout.splitlines()
    assert len(said) == 2 and all("install both from one index" in line for line in said), result.stderr
