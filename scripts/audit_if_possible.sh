#!/usr/bin/env bash
# `make audit` where PyPI's advisories can be reached, within a minute; else one line that says that it was not possible.
# Fails only when a pinned version has a known vulnerability: a machine without the network can build, too.
set -euo pipefail
cd "$(dirname "$0")/.."
limit_s=60

not_possible() {
  printf 'topfive: the dependencies were NOT audited: %s.\n' "$*" >&2
  exit 0
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=0
# pip-audit's status is 1 for what it found and for what it could not look up; only what it found leaves a report.
timeout --kill-after=5 "$limit_s" \
  make audit ARGS="--progress-spinner off --format json --output $scratch/report.json" \
  >"$scratch/log" 2>&1 </dev/null || status=$?
if [ "$status" -eq 0 ]; then
  echo "topfive: no pinned version has a known vulnerability." >&2
elif [ -s "$scratch/report.json" ]; then
  cat "$scratch/report.json" "$scratch/log" >&2
  echo "topfive: a pinned version has a known vulnerability (above); raise it in constraints.txt." >&2
  exit 1
elif [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
  not_possible "it took longer than $limit_s seconds"
else
  # The last words but make's own, which only say that it failed.
  not_possible "$(grep -v '^make' "$scratch/log" | tail -n 1 || true)"
fi
