#!/usr/bin/env bash
# Packs what tvmlab needs on a machine with a GPU, Python 3.12 and no package index (docs/gpu.md has the commands there).
#
#   benchmarks/pack_gpu.sh [OUT_DIR]          (default: .gpu-env, which git ignores)
#
# The versions are those of this environment's python (PYTHON, default python3), which must have tvmlab installed. What
# the other machine is expected to have already: numpy, ml_dtypes, scipy, pandas, matplotlib, seaborn, onnx, onnxruntime,
# filelock, networkx, psutil, tqdm, cloudpickle, nvidia-ml-py, cuda-bindings, cuda-pathfinder, a C compiler. PACK_ENV is the
# packer (default ../shared/gpu/pack-env.sh, whose settings LEVEL, LIMIT_MIB, VERIFY, CHECK_PYTHON apply).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PACK_ENV=${PACK_ENV:-../shared/gpu/pack-env.sh}

pinned() { # name==version of each package, as installed here
  "$PYTHON" -c 'import sys; from importlib.metadata import version
print(*(f"{name}=={version(name)}" for name in sys.argv[1:]))' "$@"
}

PACKAGES=$(pinned apache-tvm apache-tvm-ffi xgboost-cpu tornado \
  pydantic pydantic-core annotated-types typing-inspection typing-extensions orjson platformdirs)
export PYTHON PACKAGES
bash "$PACK_ENV" "${1:-.gpu-env}"
