"""Numbers are read and written in the same way where the user's numbers have a decimal comma."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1]

UNDER_THE_LOCALE = """
import locale
import torch
from torch import nn
import fastvae
from fastvae import ops, reference

assert locale.setlocale(locale.LC_ALL, "de_DE.UTF-8") and locale.localeconv()["decimal_point"] == ","
assert locale.str(0.5) == "0,5"
torch.manual_seed(0)
layers = nn.LeakyReLU(0.25), nn.Linear(5, 5), nn.ELU(0.7), nn.Linear(5, 5), nn.Softplus(1.5, 20.5), nn.Linear(5, 3)
decoder = nn.Sequential(nn.Linear(2, 5), *layers[:2], nn.BatchNorm1d(5, eps=0.25), *layers[2:]).double().eval()
z, x = torch.randn(1, 4, 2, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
found = ops.log_px(decoder, z, x, fastvae.Gaussian(0.5))
torch.testing.assert_close(found, reference.log_px(decoder, z, x, fastvae.Gaussian(0.5)), rtol=1e-12, atol=0)
try:
    torch.ops.fastvae.log_px(z, x, [], "leaky_relu -0.25", "gaussian 0.5")
except ValueError as error:
    assert "layer 'leaky_relu -0.25'" in str(error), error
else:
    raise AssertionError("a negative slope was taken")
try:
    torch.ops.fastvae.log_px(z, x, [], "leaky_relu 0,25", "gaussian 0.5")
except ValueError as error:
    assert "expected a number, got '0,25'" in str(error), error
else:
    raise AssertionError("a comma was taken")
try:
    torch.ops.fastvae.log_px(z, x, [], "relu", "gaussian -0.5")
except ValueError as error:
    assert "expected a number > 0, got -0.5" in str(error), error
else:
    raise AssertionError("a negative scale was taken")
print("agreed")
"""


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with de_DE, compiled where the system has none."""
    folder = tmp_path_factory.mktemp("locales")
    localedef = shutil.which("localedef")
    if localedef is None:
        pytest.skip("needs localedef")
    command = [localedef, "-i", "de_DE", "-f", "UTF-8", str(folder / "de_DE.UTF-8")]
    built = subprocess.run(command, capture_output=True, text=True)
    if not (folder / "de_DE.UTF-8" / "LC_NUMERIC").is_file():
        pytest.skip(f"localedef made no de_DE: {built.stderr[-200:]}")
    return folder


def test_numbers_do_not_depend_on_the_locale(locales: Path) -> None:
    environment = {**os.environ, "LOCPATH": str(locales), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE)}
    result = subprocess.run(
        [sys.executable, "-c", UNDER_THE_LOCALE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.stdout == "agreed\n", result.stderr[-3000:]
