#!/usr/bin/env bash
# Installs a wheel into a new environment and uses it there as a reader of the README and of docs/ would: every public
# name, then each page's blocks in an empty folder, with the packages that the page names and not before.
#
#   TORCH=2.13.0 scripts/test_wheel.sh dist/fastvae_ops-...whl
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1")
PYTHON=${PYTHON:-python3}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/env"
cp -r "$root/README.md" "$root/docs" "$root/scripts/pages.py" "$folder"
# Nothing of the source tree is in reach from here on.
cd "$folder"
env/bin/python -m pip install --quiet -c "$root/constraints.txt" "torch==$TORCH" "$wheel"
env/bin/python -m fastvae info
OMP_NUM_THREADS=2 env/bin/python - <<'PY'
import importlib
import pkgutil
from pathlib import Path

import torch

import fastvae

assert Path(fastvae.__file__).is_relative_to(Path.cwd()), fastvae.__file__
count = 0
for info in pkgutil.walk_packages(fastvae.__path__, "fastvae."):
    if info.name.startswith(("fastvae.demo", "fastvae.integrations", "fastvae.plot", "fastvae.report", "fastvae.__main__")):
        continue  # need packages that are not here
    module = importlib.import_module(info.name)
    for name in getattr(module, "__all__", ()):
        getattr(module, name)
        count += 1
print(f"test-wheel: fastvae {fastvae.__version__} under torch {torch.__version__}: {count} names")
PY
# Those that need least come first, so that no page finds what another one asked for.
mapfile -t pages < <(grep -lE '^```(python|sh)$|"cell_type": "code"' README.md docs/*.md docs/ops/*.md docs/notebooks/*.ipynb |
  while read -r page; do echo "$(env/bin/python pages.py needs "$page" | wc -w) $page"; done | sort -n | cut -d' ' -f2)
for page in "${pages[@]}"; do
  mapfile -t needs < <(env/bin/python pages.py needs "$page")
  if [ ${#needs[@]} -gt 0 ] && [ -n "${needs[0]}" ]; then
    env/bin/python -m pip install --quiet -c "$root/constraints.txt" "torch==$TORCH" "${needs[@]}"
  fi
  mkdir "$folder/empty"
  (cd empty && OMP_NUM_THREADS=2 ../env/bin/python ../pages.py run "../$page")
  rm -r "$folder/empty"
done
