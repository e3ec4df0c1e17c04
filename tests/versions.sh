#!/usr/bin/env bash
# The package on other versions of what it stands on than constraints.txt pins; run by hand before a release.
#
#     tests/versions.sh [floor] [gpu] [newest]      # default: all three
#
# floor   the lowest versions that pyproject.toml allows
# gpu     what a common image for GPUs holds: torch 2.11, triton 3.6, transformers 5.17
# newest  what the package index has today
#
# Each set takes a virtual environment of its own in VENVS (default build/versions), made once; PYTHON makes it. A set
# passes where everything imports, Triton's kernels compile for every GPU, torch.compile takes the operators, FLOPs are
# counted, the quick tests pass, and the GPU survey's dry run ends without a wrong result. The last lines say which.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENVS=${VENVS:-build/versions}
TOOLS=(pytest pytest-xdist "setuptools>=77" pybind11)
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/tests/helpers OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

packages() {  # of a set, as pip takes them
  "$PYTHON" - "$1" <<'PYTHON'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
needed = project["dependencies"] + extras["peers"] + extras["bench"] + extras["triton"]
known = {re.match(r"[\w-]+", entry)[0]: entry for entry in needed}
if sys.argv[1] == "floor":  # those without a lowest version come as the others ask for
    lowest = lambda found: f"=={found[1] if '.' in found[1] else found[1] + '.0'}.*"
    known = {name: re.sub(r">=([\d.]+).*", lowest, entry) for name, entry in known.items()}
if sys.argv[1] == "gpu":
    known |= dict(torch="torch==2.11.*", triton="triton==3.6.*", transformers="transformers==5.17.*")
if sys.argv[1] != "newest":
    known["numpy"] = "numpy<2.4"  # Triton 3.6's interpreter takes no newer one
print(*known.values(), sep="\n")
PYTHON
}

check() {  # NAME COMMAND...: one line of the report, and a log
  local log=$VENVS/$set-$1.log
  if "${@:2}" >"$log" 2>&1; then report+=("$set: $1 passes"); else report+=("$set: $1 FAILS, see $log"); failed=1; fi
  echo "${report[-1]}: $(tail -1 "$log")"
}

survey() {
  "$python" benches/gpu/survey.py --dry --seconds 600 --out "$VENVS/$set" || return
  ! grep -E '"note": "(WRONG|FAILED|left out|ended)' "$VENVS/$set/survey.jsonl"
}

failed=0 report=()
[ $# -gt 0 ] || set -- floor gpu newest
for set in "$@"; do
  case $set in floor | gpu | newest) ;; *) echo "no set named $set: floor, gpu or newest" >&2; exit 2 ;; esac
  python=$(realpath -m "$VENVS")/$set/bin/python
  if [ ! -x "$python" ]; then
    mkdir -p "$VENVS"
    "$PYTHON" -m venv "$VENVS/$set" && mapfile -t wanted < <(packages "$set") &&
      "$python" -m pip install --quiet "${wanted[@]}" "${TOOLS[@]}" || { failed=1; report+=("$set: cannot be installed"); continue; }
  fi
  "$python" -c 'import sys, torch, transformers; print("Python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)'
  run=("$python" -m pytest -q -p no:cacheprovider)
  check imports "$python" -c 'import align_kernels, align_engine.cli, align_engine.run, align_engine.iterate, align_engine.integrations'
  check extensions "$python" setup.py --quiet build_ext --inplace
  check triton env ALIGN_TRITON_AOT=1 "${run[@]}" tests/triton_aot
  check compile "${run[@]}" tests/kernels/test_citizen.py -k compile
  check flops "${run[@]}" tests/kernels/test_flops.py
  check quick "${run[@]}" tests -m quick
  # Triton 3.6's interpreter does what numpy 2.3 warns of
  check interpreter env TRITON_INTERPRET=1 "${run[@]}" -W "ignore:Conversion of an array:DeprecationWarning" tests/triton_interp -m quick
  check survey survey
done
printf '%s\n' "${report[@]}"
exit $failed
