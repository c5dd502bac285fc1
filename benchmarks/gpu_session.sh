#!/usr/bin/env bash
# gpu_session.py on a machine that is lent for ten minutes a call (benchmarks/README.md), ended in time whatever happens.
#
#   benchmarks/gpu_session.sh OUT [options of gpu_session.py]
#
# What pack_gpu.sh packed into .gpu-env is unpacked first, unless it is there. OUT/console.txt gets all that is printed,
# the terminal its end. Of 600 s: 17 to unpack, LIMIT_S (540) until the session is interrupted, 15 until it is killed. By
# itself it ends earlier, after 8.5 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$1
shift
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

if ls .gpu-env/env.pyz* > /dev/null 2>&1; then # one file, or parts of it
  cat .gpu-env/env.pyz* > /tmp/env.pyz
  unpacked=/tmp/env-$(cksum < /tmp/env.pyz | tr " " -)
  [ -e "$unpacked/whole" ] || { "$PYTHON" /tmp/env.pyz "$unpacked" && touch "$unpacked/whole"; } || exit
  export PYTHONPATH=$unpacked:$PWD
fi
# Where some machines keep the driver's libraries: NVML and CUDA are then not found by themselves.
driver=/usr/local/nvidia/lib64
[ -d $driver ] && export LD_LIBRARY_PATH=$driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# A virtual machine may be given memory only as it asks for it: what is free says nothing.
export PYTHONUNBUFFERED=1 TVMLAB_CHECK_MEMORY=0

{
  nvidia-smi
  ldconfig -p | grep -E 'nvidia-ml|libcuda' || echo "the loader knows no library of NVIDIA's driver"
  free -g
  df -h /tmp /dev/shm
} > "$OUT/console.txt" 2>&1
timeout -k 15 -s INT "${LIMIT_S:-540}" "$PYTHON" benchmarks/gpu_session.py --out "$OUT" --minutes 8.5 "$@" \
  >> "$OUT/console.txt" 2>&1
code=$?
tail -c 9000 "$OUT/console.txt"
exit $code
