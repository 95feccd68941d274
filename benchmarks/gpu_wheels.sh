#!/bin/sh
# Wheels for a GPU machine that has torch, NumPy and the like, but no network, and Transformers too old or none.
#
# Here, in the repository, into .gpu/wheels, which git ignores (about 40 MiB; PYTHON_VERSION=3.12 is the Python there):
#
#     sh benchmarks/gpu_wheels.sh
#     git clone --depth 1 https://github.com/fla-org/flash-bidirectional-linear-attention .gpu/peer   # if it shall run
#
# There, in a copy of the repository with .gpu in it. Six minutes, so that a part can be repeated within ten:
#
#     python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/site .gpu/wheels/*.whl
#     export PYTHONPATH=/tmp/site:.gpu/peer HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
#     timeout 420 python3 -m benchmarks.gpu --minutes 6 --output results 2>&1 | tee gpu.log
#     timeout 200 python3 -m benchmarks.gpu --minutes 3 --output results --parts model     # what did not end well
#
# `--output` is any folder; its *-cuda.json belong into benchmarks/results.
set -eu
cd "$(dirname "$0")/.."
# torch with its own, what is large and of which any recent release does, and what develops this package
large='torch|triton|nvidia-.*|cuda-.*|sympy|mpmath|networkx|setuptools|numpy|scipy|pandas|pyarrow|scikit-learn|pillow'
large="$large|matplotlib|fonttools|contourpy|kiwisolver|ruff|mypy|mypy-extensions|ast-serialize|librt|hypothesis|types-.*"
rm -rf .gpu/wheels
mkdir -p .gpu
grep -Ev "^($large)==|^ *#" constraints.txt >.gpu/requirements.txt
platforms=$(for glibc in 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do echo "--platform manylinux_${glibc}_x86_64"; done)
# shellcheck disable=SC2086
"${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" $platforms --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    -d .gpu/wheels -r .gpu/requirements.txt
size=$(du -sm .gpu/wheels | cut -f1)
echo ".gpu/wheels: $(ls .gpu/wheels | wc -l) wheels, $size MiB"
test "$size" -lt 60
