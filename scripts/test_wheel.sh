#!/usr/bin/env bash
# Installs a wheel into a new environment and uses it there as a reader of the README would.
#
#   TORCH=2.13.0 scripts/test_wheel.sh dist/fastvae_ops-...whl
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1")
PYTHON=${PYTHON:-python3}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/env"
cp "$root/README.md" "$root/docs/tour.md" "$folder"
# Nothing of the source tree is in reach from here on.
cd "$folder"
env/bin/python -m pip install --quiet "torch==$TORCH" "$wheel[train,influence,ood]"
env/bin/python -m fastvae info
OMP_NUM_THREADS=2 env/bin/python - <<'EOF'
import importlib
import pkgutil
import re
from pathlib import Path

import torch

import fastvae

assert Path(fastvae.__file__).is_relative_to(Path.cwd()), fastvae.__file__
count = 0
for info in pkgutil.walk_packages(fastvae.__path__, "fastvae."):
    if info.name.startswith(("fastvae.demo", "fastvae.integrations", "fastvae.__main__")):
        continue  # need packages that are not here
    module = importlib.import_module(info.name)
    for name in getattr(module, "__all__", ()):
        getattr(module, name)
        count += 1
done = 0
for page in ("README.md", "tour.md"):
    names = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```", Path(page).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), names)
        done += 1
print(f"test-wheel: fastvae {fastvae.__version__} under torch {torch.__version__}: {count} names, "
      f"{done} blocks of the README and the tour")
EOF
