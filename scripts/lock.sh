#!/usr/bin/env bash
# Writes constraints.txt anew: the newest versions that pyproject.toml allows, as pip resolves them today.
#
# Only torch keeps its release: it decides which CUDA everything else is built for, so it is raised by hand, with
# measurements (edit its line in constraints.txt, then run this).
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"${PYTHON:-python3}" -m venv "$scratch/venv"
grep '^torch==' constraints.txt > "$scratch/torch.txt"
# The build backend is not part of the environment, but what builds the package should not change unnoticed either.
"$scratch/venv/bin/pip" install --disable-pip-version-check --constraint "$scratch/torch.txt" \
  --editable '.[dev]' hatchling editables
# Without +cpu and the like: where the build comes from is the business of the machine.
"$scratch/venv/bin/pip" freeze --exclude-editable --exclude topfive --all \
  | grep -v '^pip==' | sed 's/+[a-z0-9.]*$//' | LC_ALL=C sort -f > "$scratch/constraints.txt"
mv "$scratch/constraints.txt" constraints.txt
git --no-pager diff --stat -- constraints.txt
