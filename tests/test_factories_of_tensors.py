"""Each call of the package that makes a tensor names a device: none lies wherever `torch.set_default_device` says."""

from __future__ import annotations

import ast
from pathlib import Path

import fastvae

FACTORIES = frozenset(
    {
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randint",
    }
    | {"randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"}
)
# What these make are a module's own parameters and buffers, which follow the default as those of PyTorch's modules do;
# or codes for a model that has no parameters.
FOLLOW = {
    *("fastvae/likelihoods/learned.py", "fastvae/models/adaptation.py", "fastvae/models/tempering.py"),
    *(
        "fastvae/penalties/annealing.py",
        "fastvae/metrics/evidence.py _place",
        "fastvae/models/base.py sample",
    ),
}


def test_every_factory_names_a_device() -> None:
    package = Path(fastvae.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package.parent).as_posix()
        tree, followed = ast.parse(path.read_text(encoding="utf-8")), set[int]()
        for node in ast.walk(tree):
            owner = f"{name} {node.name}" if isinstance(node, ast.FunctionDef) else name
            if {name, owner} & FOLLOW:
                followed |= {id(call) for call in ast.walk(node)}
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_factory(node.func)]
        for call in calls:
            named = any(keyword.arg in ("device", None) for keyword in call.keywords)
            if not named and id(call) not in followed:
                found.append(f"{name}:{call.lineno}: {ast.unparse(call)}")
    assert found == [], "a tensor without a device lies wherever the user's default is"


def _is_factory(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "torch"
        and function.attr in FACTORIES
    )
