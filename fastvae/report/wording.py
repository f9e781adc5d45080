"""Numbers in sentences."""

from __future__ import annotations

import math

from torch import Tensor

from fastvae.metrics import Estimate

__all__ = ["article", "estimated", "listed", "mean_with_error", "nats", "time_of"]


def mean_with_error(values: Tensor) -> Estimate:
    """The mean of [N] values and its standard error, NaN for a single one."""
    spread = float(values.double().std()) if len(values) > 1 else math.nan
    return Estimate(float(values.double().mean()), spread / math.sqrt(len(values)))


def estimated(value: Estimate) -> str:
    """With as many digits as the error leaves."""
    digits = 2
    if math.isfinite(value.standard_error) and value.standard_error > 0:
        digits = min(6, max(0, 1 - math.floor(math.log10(value.standard_error))))
    return f"{value.mean:,.{digits}f} ± {value.standard_error:.{digits}f}".replace("-", "−")


def nats(value: float) -> str:
    """Of scores that may be small or very large."""
    size = abs(value)
    scaled, unit = (value / 1000, "k") if size >= 1000 else (value, "")
    digits = 2 if size < 10 else 0 if size >= 1e5 else 1
    text = f"{scaled:.{digits}f}{unit}"
    return text.replace("-", "−")


def time_of(seconds: float) -> str:
    """In milliseconds, or seconds where there are many."""
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def listed(words: list[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def article(name: str) -> str:
    """A VAE, an HVAE."""
    return f"{'an' if name[0] in 'AEFHILMNORSX' and name[:2].isupper() else 'a'} {name}"
