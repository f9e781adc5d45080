"""Run as a script: COUNT calls of every op, each spoilt in one or two places. bad_calls.py SEED COUNT

Prints how many raised and how many were taken. A call may succeed, or raise what is documented. Any other exception
is printed with its call and fails the script; before a crash, the call's number and name were written to standard
error.
"""

from __future__ import annotations

import random
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae import ops

DOCUMENTED = (ValueError, TypeError, RuntimeError, NotImplementedError, OverflowError)
"""NotImplementedError is torch's for a device or layout without a kernel, OverflowError Python's for huge integers."""

raw: Any = torch.ops.fastvae
below: Any = fastvae._C
decoder = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 3))
image = nn.Sequential(
    nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.ReLU(), nn.ConvTranspose2d(2, 1, 3, stride=2)
)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def good_calls() -> list[tuple[str, Callable[..., Any], list[Any]]]:
    """Name, function and arguments of one good call of every entry."""
    low, conv = fastvae.lowering.lower(decoder), fastvae.lowering.lower(image)
    z, rho, x = normal(4, 2), normal(4, 2), torch.rand(4, 3)
    step, alpha = torch.full((3, 2), 0.1), torch.full((3,), 0.9)
    flow = [z, rho, x, step, alpha, low.tensors, low.spec, "bernoulli"]
    out = raw.hamiltonian_flow(*flow, True, False)
    backward = [
        None,
        normal(4, 2),
        normal(4),
        *flow[:6],
        out[3],
        out[4],
        out[6],
        low.spec,
        "bernoulli",
        True,
        [1] * 9,
    ]
    h, delta = normal(4, 3, 5), normal(4, 3, 2)
    lists = [[h], [delta], [h[:2]], [delta[:2]]]
    calls: list[tuple[str, Callable[..., Any], list[Any]]] = [
        ("ops.leapfrog_kick_drift", ops.leapfrog_kick_drift, [z, rho, rho, 0.1]),
        ("ops.leapfrog_kick_temper", ops.leapfrog_kick_temper, [rho, z, 0.1, 0.5]),
        ("ops.hamiltonian_flow", ops.hamiltonian_flow, [decoder, z, rho, x, step, alpha, "bernoulli"]),
        ("ops.jacobian_l1", ops.jacobian_l1, [decoder, z, "none"]),
        ("ops.grad_dot", ops.grad_dot, [h, delta, h[:2], delta[:2], True]),
    ]
    for place, where in (("raw", raw), ("_C", below)):
        calls += [
            (f"{place}.leapfrog_kick_drift", where.leapfrog_kick_drift, [z, rho, rho, step[0]]),
            (
                f"{place}.leapfrog_kick_drift_backward",
                where.leapfrog_kick_drift_backward,
                [z, z, z, rho, rho, step[0]],
            ),
            (f"{place}.leapfrog_kick_temper", where.leapfrog_kick_temper, [rho, z, step[0], alpha[0]]),
            (
                f"{place}.leapfrog_kick_temper_backward",
                where.leapfrog_kick_temper_backward,
                [z, rho, rho, step[0], alpha[0]],
            ),
            (f"{place}.hamiltonian_flow", where.hamiltonian_flow, [*flow, True, True]),
            (f"{place}.hamiltonian_flow_backward", where.hamiltonian_flow_backward, backward),
            (f"{place}.grad_dot", where.grad_dot, [*lists, [1]]),
            (f"{place}.grad_dot_backward", where.grad_dot_backward, [normal(4, 2), *lists, [1], [1] * 4]),
            (f"{place}.jacobian_l1", where.jacobian_l1, [z, conv.tensors, conv.spec, [0, 1], 1, "sum"]),
            (
                f"{place}.jacobian_l1_with_gradient",
                where.jacobian_l1_with_gradient,
                [None, z, low.tensors, low.spec, [0, 1], 1, "mean", [1] * 5],
            ),
        ]
    return calls


WORDS = [
    *(
        "linear",
        "conv2d",
        "conv_transpose2d",
        "batch_norm",
        "reshape",
        "relu",
        "elu",
        "softplus",
        "gelu",
        "nonsense",
    ),
    *(
        "-1",
        "0",
        "1",
        "2",
        "3",
        "7",
        "99",
        "-5",
        "9223372036854775807",
        "99999999999999999999",
        "1e300",
        "nan",
        "inf",
    ),
    *("-0.5", "", ";", "sigmoid", "gaussian", "bernoulli", "categorical", "\0", "\N{GREEK SMALL LETTER PHI}"),
]


def spoil_text(text: str) -> str:
    words = text.replace(";", " ; ").split(" ")
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(words))
        change = random.randrange(4)
        if change == 0:
            words[at] = random.choice(WORDS)
        elif change == 1:
            words.insert(at, random.choice(WORDS))
        elif change == 2:
            del words[at : at + random.choice((1, 2, 5))]
            words = words or [""]
        else:
            words = [*words, ";", *words]
    return " ".join(words).replace(" ; ", ";")


def spoil_tensor(t: Tensor) -> Any:
    dim = max(1, t.dim())
    change = random.choice(
        [
            lambda: t.double() if t.dtype != torch.float64 else t.float(),
            lambda: t.half(),
            lambda: t.to(torch.bfloat16),
            lambda: t.long(),
            lambda: t.bool(),
            lambda: t.to(torch.complex64),
            lambda: t.to("meta"),
            lambda: t.to_sparse() if t.dim() else t,
            lambda: t.unsqueeze(0),
            lambda: t.flatten(),
            lambda: t[:0] if t.dim() else t,
            lambda: t[..., :0] if t.dim() else t,
            lambda: t[:1] if t.dim() else t,
            lambda: t.repeat(*[2] * dim),
            lambda: t.mT if t.dim() > 1 else t,
            lambda: t.expand(3, *t.shape),
            lambda: torch.full_like(t, float("nan")),
            lambda: torch.full_like(t, float("inf")),
            lambda: t * 1e38,
            lambda: t.clone().requires_grad_(),
            lambda: normal(2**10).as_strided((2**8, 2), (0, 0)),
            lambda: torch.empty(0),
            lambda: torch.tensor(1.0),
            lambda: None,
            lambda: "text",
            lambda: 1.5,
            lambda: [],
            lambda: object(),
        ]
    )
    try:
        return change()
    except RuntimeError:  # spoilt before in a way that leaves no room for this one
        return None


def spoil(value: Any) -> Any:
    """Something else in the place of an argument, near it or far."""
    if isinstance(value, Tensor):
        return spoil_tensor(value)
    if isinstance(value, str):
        return random.choice([spoil_text(value), spoil_text(value), "", "nonsense", 3, None])
    if isinstance(value, bool):
        return random.choice([not value, None, "yes", 2, torch.tensor(True)])
    if isinstance(value, int):
        return random.choice([0, -1, 3, 2**31, 2**63 - 1, 2**64, None, 0.5, "1"])
    if isinstance(value, float):
        return random.choice([float("nan"), float("inf"), -1.0, 1e300, None, "0.1", torch.ones(7), 2**70])
    if isinstance(value, list):
        changed = list(value)
        change = random.randrange(5)
        if change == 0 or not changed:
            return random.choice([[], changed * 2, changed[:-1], None, tuple(changed), "list"])
        at = random.randrange(len(changed))
        changed[at] = spoil(changed[at])
        return changed
    if isinstance(value, nn.Module):
        return random.choice(
            [
                nn.Identity(),
                nn.Linear(3, 3),
                nn.Sequential(),
                nn.Linear(2, 3).double(),
                nn.Sequential(nn.Linear(2, 3), nn.Sigmoid()),
                nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
                nn.LSTM(2, 3),
                nn.Embedding(3, 3),
                lambda z: z,
                None,
            ]
        )
    return random.choice([normal(4, 2), normal(1), 3, "text"])


undocumented: list[str] = []


def attempt(name: str, function: Callable[..., Any], arguments: list[Any]) -> bool:
    """Whether the call was taken; its gradient, if it has one, is then asked for too."""
    spoilt = list(arguments)
    for _ in range(random.choice((1, 1, 1, 2))):
        at = random.randrange(len(spoilt))
        spoilt[at] = spoil(spoilt[at])
    try:
        result = function(*spoilt)
        outputs = [
            r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, Tensor)
        ]
        wanted = [o for o in outputs if o.requires_grad and o.is_floating_point()]
        if wanted:
            torch.stack([o.sum() for o in wanted]).sum().backward()
    except DOCUMENTED:
        return False
    except Exception:
        print(f"{name} raised what is not documented:", file=sys.stderr)
        for argument in spoilt:
            print("  ", repr(argument)[:300].replace("\n", " "), file=sys.stderr)
        traceback.print_exc()
        undocumented.append(name)
    return True


def main(seed: int, count: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    random.seed(seed)
    torch.manual_seed(seed)
    calls = good_calls()
    for _name, function, arguments in calls:
        function(*arguments)
    taken = 0
    for number in range(count):
        name, function, arguments = calls[number % len(calls)]
        random.seed(seed * 1_000_003 + number)
        # What a crash leaves behind.
        print(f"\r{number} {name}", end="", file=sys.stderr, flush=True)
        taken += attempt(name, function, arguments)
    # The process is sound after all that.
    for _name, function, arguments in calls:
        function(*arguments)
    print(f"raised {count - taken}, taken {taken}")
    sys.exit(3 if undocumented else 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
