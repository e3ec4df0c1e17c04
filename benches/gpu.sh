#!/usr/bin/env bash
# Everything that needs a GPU, in parts of at most nine minutes.
#
#     benches/gpu.sh PART|all [--dry] [--wheels FOLDER] [--out FOLDER]
#
# PART     build          the package with its CUDA extension into .gpu-venv, peers from FOLDER, no network
#          tests-triton   the kernels' tests on the GPU with fresh random inputs and poisoned memory, backend triton
#          tests-cuda     the same, backend cuda
#          ceilings       copy bandwidth and GEMMs
#          forward, frozen, full      tables of heads: benches/gpu/heads.py
#          step-0.5B, step-7B         whole steps: benches/gpu/steps.py
# all      one after the other; a part that fails does not stop the others
# --dry    every part on the CPU with tiny shapes and the Python that runs, to prove the scripts; builds nothing
#
# Needs torch for CUDA, triton, transformers, setuptools, pybind11 and pytest in the Python that is called python3 (or
# PYTHON), or as wheels in FOLDER with the peers, and nvcc in CUDA_HOME or on PATH. Results: PART.json and PART.md in benches/results, or --out.
set -uo pipefail
cd "$(dirname "$0")/.."

PARTS=(build tests-triton tests-cuda ceilings forward frozen full step-0.5B step-7B)
MINUTES=9
dry= wheels= out=benches/results part=
while [ $# -gt 0 ]; do
  case $1 in
    --dry) dry=--dry ;;
    --wheels) wheels=${2:?--wheels needs a folder}; shift ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    -*) echo "unknown option $1: see the head of $0" >&2; exit 2 ;;
    *) part=$1 ;;
  esac
  shift
done
case " all ${PARTS[*]} " in
  *" ${part:-none} "*) ;;
  *) echo "name a part: all ${PARTS[*]}" >&2; exit 2 ;;
esac
mkdir -p "$out"

python=${PYTHON:-python3}
[ -z "$dry" ] && [ -x .gpu-venv/bin/python ] && python=$PWD/.gpu-venv/bin/python
export PYTHONPATH=.:kernels:benches/gpu TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

build() {
  [ -n "$dry" ] && { "$python" -c 'import align_kernels; print(*align_kernels.backends_report(), sep="\n")'; return; }
  "${PYTHON:-python3}" -m venv --system-site-packages .gpu-venv || return
  local pip=(.gpu-venv/bin/python -m pip install --quiet --no-index --disable-pip-version-check)
  if [ -n "$wheels" ]; then
    for wheel in "$wheels"/*.whl; do  # a peer that does not install is left out, and its rows say so
      "${pip[@]}" --no-deps "$wheel" || echo "left out: $wheel" >&2
    done
  fi
  FORCE_CUDA=1 .gpu-venv/bin/python setup.py --quiet build_ext --inplace || return
  PYTHONPATH=kernels .gpu-venv/bin/python - <<'PYTHON'
import torch
from align_kernels.backends import cuda, triton
gpu = torch.device("cuda", torch.cuda.current_device())
for backend in (cuda, triton):
    print(backend.__name__, backend.why_not(gpu, torch.bfloat16) or "serves")
PYTHON
}

# the seed differs from run to run and stands in the log
tests() {
  local seed=$((RANDOM * 32768 + RANDOM)) device=cuda impl=$1 files=(tests/kernels)
  local others=(--ignore-glob '*cpu_extension*' --ignore-glob '*triton*' --ignore-glob '*cuda*' --ignore-glob '*imports*')
  [ -n "$dry" ] && device=cpu:0 impl=torch files=(tests/kernels/test_logprobs.py::test_targets_at_the_edges tests/kernels/test_losses.py::test_upstream_factor)
  echo "backend $impl on $device, seed $seed"
  ALIGN_TEST_DEVICE=$device ALIGN_TEST_IMPL=$impl ALIGN_TEST_SEED=$seed ALIGN_TEST_POISON=1 \
    CUBLAS_WORKSPACE_CONFIG=:4096:8 "$python" -m pytest -q "${files[@]}" "${others[@]}" -p no:cacheprovider \
    -W 'ignore:.*does not have a deterministic implementation'
}

run() {
  case $1 in
    build) build ;;
    tests-*) tests "${1#tests-}" ;;
    ceilings) "$python" benches/gpu/ceilings.py $dry --out "$out" ;;
    forward | frozen | full) "$python" benches/gpu/heads.py "$1" $dry --out "$out" ;;
    step-*) "$python" benches/gpu/steps.py "${1#step-}" $dry --out "$out" ;;
  esac
}

failed=()
[ "$part" = all ] || PARTS=("$part")
for name in "${PARTS[@]}"; do
  echo "== $name =="
  export -f run build tests
  export python dry wheels out
  log=$out/${dry:+dry-}$name.log
  if timeout "${MINUTES}m" bash -c 'run "$1"' - "$name" 2>&1 | tee "$log"; then :; else failed+=("$name"); fi
  [ "$name" = build ] && [ -z "$dry" ] && [ -x .gpu-venv/bin/python ] && python=$PWD/.gpu-venv/bin/python
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
