#!/usr/bin/env bash
# Makes the environments of the servers that benchmarks/compare.py compares:   scripts/compare_environments.sh FOLDER [NAME...]
#
# One for each, FOLDER/NAME, since their requirements exclude each other; versions are those of
# benchmarks/servers/requirements/NAME.txt. Without names, all. What cannot be installed is said at the end and left out.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$1
shift
python=${PYTHON:-python3.11}
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
  for file in benchmarks/servers/requirements/*.txt; do names+=("$(basename "$file" .txt)"); done
fi

make_one() {
  local name=$1 requirements=benchmarks/servers/requirements/$1.txt
  if [ "$name" = triton ]; then
    scripts/triton_environment.sh "$folder/$name" --requirement "$requirements"
  else
    "$python" -m venv "$folder/$name" &&
      "$folder/$name/bin/pip" install --disable-pip-version-check --quiet --requirement "$requirements"
  fi
}

failed=()
mkdir -p "$folder"
for name in "${names[@]}"; do
  echo "topfive: making $folder/$name" >&2
  make_one "$name" || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
  for name in "${failed[@]}"; do rm -rf "${folder:?}/$name"; done
  echo "topfive: could not install ${failed[*]}; the reason is above. The comparison goes without." >&2
  exit 1
fi
