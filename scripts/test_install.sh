#!/usr/bin/env bash
# What README.md and docs/install.md tell to type, in a new environment with torch and nothing else: pip, then uv. Only the
# address of the repository is filled in, with what git would check out here; and the kernels are compiled for one
# instruction set, in a third of the time.
#
#   TORCH=2.13.0 scripts/test_install.sh
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
export CFLAGS="${CFLAGS:-} -DFASTVAE_NO_CLONES"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet -c "$root/constraints.txt" "torch==$TORCH"
cp "$root/README.md" "$root/scripts/pages.py" "$folder"
cd "$folder"

# block PAGE HEADING: the commands of the first indented block under that heading, without what they say.
block() {
  awk -v heading="## $2" '
    /^## / { inside = ($0 == heading) }
    inside && /^    / { found = 1; print substr($0, 5) }
    inside && found && !/^    / { exit }' "$root/$1"
}

# What is committed or would be, as a clone holds it: no build, no environment.
git() {
  [ "$1" = clone ] || { command git "$@"; return; }
  mkdir "${!#}"
  (cd "$root" && command git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$folder/${!#}")
}

export PATH="$folder/env/bin:$PATH" VIRTUAL_ENV="$folder/env"
eval "$(block README.md Install)"
# From inside the checkout too, whose sources hide the installed package.
(cd fastvae && python -m fastvae info >/dev/null)
(mkdir empty && cd empty && OMP_NUM_THREADS=2 python ../pages.py run ../README.md)

pip install --quiet uv
pip uninstall --quiet --yes fastvae-ops
# uv isolates: the build says so, and does not claim that torch is missing.
if uv pip install ./fastvae >uv.txt 2>&1; then
  echo "test-install: uv built without --no-build-isolation" >&2
  exit 1
fi
tr -s ' \n' ' ' <uv.txt | grep -q "uv pip install --no-build-isolation"
eval "$(block docs/install.md "Isolated builds, uv")"
(cd empty && python -m fastvae info)
