#!/usr/bin/env bash
# Packs what tvmlab needs on a machine with a GPU, Python 3.12 and no package index (benchmarks/README.md).
#
#   benchmarks/pack_gpu.sh [OUT_DIR]          (default: .gpu-env, which git ignores)
#
# The versions are those of this environment's python (PYTHON, default python3), which must have tvmlab installed. What
# the other machine is expected to have already: numpy, ml_dtypes, scipy, pandas, matplotlib, seaborn, onnx, onnxruntime,
# filelock, networkx, psutil, tqdm, cloudpickle, nvidia-ml-py, cuda-bindings, cuda-pathfinder, a C compiler. PACK_ENV is the
# packer (default ../shared/gpu/pack-env.sh, whose settings LEVEL and LIMIT_MIB apply). CHECK_PYTHON, a Python 3.12 with
# those packages, has what was packed unpacked and imported once.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PACK_ENV=${PACK_ENV:-../shared/gpu/pack-env.sh}
OUT=${1:-.gpu-env}

if [ ! -f "$PACK_ENV" ]; then
  echo "the packer $PACK_ENV is missing: it is no part of this repository. Name one in PACK_ENV (benchmarks/README.md says" \
    "what it has to do); where there is a package index, pip install -e '.[cuda,torch]' is all that is needed" >&2
  exit 1
fi

pinned() { # name==version of each package, as installed here
  "$PYTHON" -c 'import sys; from importlib.metadata import version
print(*(f"{name}=={version(name)}" for name in sys.argv[1:]))' "$@"
}

PACKAGES=$(pinned apache-tvm apache-tvm-ffi xgboost-cpu tornado \
  pydantic pydantic-core annotated-types typing-inspection typing-extensions orjson platformdirs)
# The packer's own check trips over a folder of pydantic-core's that is empty once its .pyi files are left out.
export PYTHON PACKAGES VERIFY=0
bash "$PACK_ENV" "$OUT"

if [ -n "${CHECK_PYTHON:-}" ]; then
  check=$(mktemp -d)
  trap 'rm -rf "$check"' EXIT
  cat "$OUT"/env.pyz* > "$check/env.pyz"
  "$CHECK_PYTHON" "$check/env.pyz" "$check/env" # ends with an error if a library is damaged
  PYTHONPATH="$check/env:$PWD" "$CHECK_PYTHON" -c 'import tvm, xgboost, tornado, tvmlab
print(tvm.__version__, xgboost.__version__, tvmlab.preset("fast", "squeezenet", "cpu").steps)'
fi

# What travels with a call to a lent machine (benchmarks/README.md).
tree=$(git ls-files -z | xargs -0 cat | wc -c)
packed=$(cat "$OUT"/env.pyz* | wc -c)
awk -v tree="$tree" -v packed="$packed" 'BEGIN { left = 64 - (tree + packed) / 1048576
  printf "%.1f MiB packed, %.1f MiB of tracked files: %.1f of 64 MiB are left\n", packed / 1048576, tree / 1048576, left
  exit left < 0 }'
