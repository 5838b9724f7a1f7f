#!/usr/bin/env bash
# Collect what a machine without a network lacks: experiments/gpu/wheels.sh FOLDER [PYTHON, as 3.12] [PACKAGE...]
#
# The packages are those that a machine with PyTorch, Lightning, timm, torchmetrics and transformers needs besides, in
# the versions of .constraints.txt; `python experiments/gpu/missing.py` there says which are missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
python=${2:-3.12}
shift $(($# < 2 ? $# : 2))
packages=("$@")
if [ $# -eq 0 ]; then
  packages=(hydra-core omegaconf diffusers greenlet pydantic pydantic_core annotated-types typing-inspection
    importlib_metadata zipp)
fi

platforms=()
for version in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
mkdir -p "$folder"
for package in "${packages[@]}"; do
  pinned=$(grep -i "^$package==" .constraints.txt || echo "$package")
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
    "${platforms[@]}" --dest "$folder" "$pinned"
done
# Published as source alone, and pure Python.
python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$(grep ^antlr4 .constraints.txt)"
du -sh "$folder"
