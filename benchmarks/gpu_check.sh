#!/usr/bin/env bash
# The loss kernels on a bare machine with a GPU: build, correctness, compute-sanitizer, benchmark, in under ten minutes.
#
#     benchmarks/gpu_check.sh
#
# Needs torch for CUDA, nvcc and a C++ compiler; no network, DeepSpeed or datasets. From the environment:
#     OUT      where logs go (benchmarks/results/gpu-DATE)
#     PYTHON   the Python that has torch (python3)
#     WHEELS   a folder of wheels of rivals to install for this run (liger-kernel, cut-cross-entropy, quack-kernels, ...)
#     SECONDS_IN_ALL   the time there is (570)
# Every step has a limit, and later ones keep a share of the time whatever earlier ones do. Exit code 0: all passed.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results/gpu-$(date +%F)}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-570}))
site=
summary=()
failed=0

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check: $python sees no GPU (torch.cuda.is_available() is not true); nothing was checked" >&2
  exit 1
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$root" || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

note() {  # RESULT NAME SECONDS DETAIL
  summary+=("$(printf '%-8s %-12s %4s s  %s' "$@")")
  [ "$1" = ok ] || [ "$1" = skipped ] || failed=1
  echo "== ${summary[-1]}"
}

# step NAME LOG MOST KEPT COMMAND...: at most MOST seconds, and KEPT are left for what follows. Sets `code`.
step() {
  local name=$1 log=$2 most=$3 kept=$4 start=$SECONDS left
  shift 4
  left=$((deadline - SECONDS - kept))
  [ "$left" -lt "$most" ] && most=$left
  echo "== $name (at most $most s)" | tee -a "$out/$log"
  if [ "$most" -lt 5 ]; then
    code=124
  else
    timeout --kill-after=10 "$most" "$@" 2>&1 | tee -a "$out/$log" | tail -n "${LINES_SHOWN:-15}"
    code=${PIPESTATUS[0]}
  fi
  took=$((SECONDS - start))
}

judged() {  # NAME DETAIL: the last step passed when its code is 0
  case $code in
    0) note ok "$1" "$took" "$2" ;;
    124 | 137) note late "$1" "$took" "its time ran out" ;;
    *) note FAILED "$1" "$took" "exit code $code" ;;
  esac
}

# A sanitizer's step passes when the checks did, the tool came to its end, and no report names a kernel of ours. What
# torch's own kernels are blamed for is in the log. No allocator in between: it would hide what is out of bounds.
sanitizer() {  # TOOL MOST KEPT
  local tool=$1 log=sanitizer-$1.log found
  step "$tool" "$log" "$2" "$3" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$checker" --tool "$tool" --print-limit 20 "$python" benchmarks/gpu_correctness.py --small
  if [ "$code" = 0 ] && ! grep -q 'SUMMARY' "$out/$log"; then code=1; fi
  found=$(grep -c '^=========.*sett::' "$out/$log")
  [ "$tool" = memcheck ] && found=$((found + $(grep -c '^========= Invalid' "$out/$log")))
  if [ "$found" -gt 0 ]; then
    note FAILED "$tool" "$took" "$found lines name our kernels: $log"
  else
    judged "$tool" "$(grep 'SUMMARY' "$out/$log" | tail -1 | tr -d '=')"
  fi
}

{
  date -u
  nvidia-smi
  nvcc --version
  c++ --version
  "$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_properties(0))'
} >"$out/machine.log" 2>&1

if [ -n "${WHEELS:-}" ] && compgen -G "$WHEELS/*.whl" >/dev/null; then
  site=$(mktemp -d)
  step wheels checks.log 60 480 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  judged wheels "$(cd "$WHEELS" && echo *.whl | cut -c1-100)"
fi

step build checks.log 200 300 "$python" -c 'from trainer.losses import fused; fused.load(print); print("isa", fused.isa())'
judged build "$(grep -h 'compiled the loss' "$out/checks.log" | tail -1)"
built=$code

if [ "$built" = 0 ]; then
  step correctness checks.log 120 250 "$python" benchmarks/gpu_correctness.py
  judged correctness "$(grep -h 'checks passed' "$out/checks.log" | tail -1)"

  if "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
    step pytest checks.log 75 220 "$python" -m pytest tests/losses -q -p no:cacheprovider -k 'cuda or gpu'
    if [ "$code" = 5 ]; then note skipped pytest "$took" "tests/losses has no tests of GPUs"; else
      judged pytest "$(tail -1 "$out/checks.log")"
    fi
  else
    note skipped pytest 0 "pytest or hypothesis is not installed"
  fi

  checker=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
  if [ -n "$checker" ]; then
    sanitizer memcheck 60 170
    sanitizer racecheck 60 140
    sanitizer initcheck 60 110
  else
    note FAILED sanitizer 0 "compute-sanitizer is not on the PATH, nor under CUDA_HOME"
  fi

  # The long ones first: what is finished when the time runs out is in the file.
  LINES_SHOWN=120 PYTHONPATH=$PYTHONPATH${site:+:$site} \
    step benchmark benchmark.log 400 5 "$python" benchmarks/kernels.py --rounds 7 --out "$out/kernels.json" \
    --case linear-ce segment-ce ce-kl heads heads-count
  judged benchmark "$out/kernels.json"
fi
[ -n "$site" ] && rm -rf "$site"

printf '%s\n' "" "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)" \
  "${summary[@]}" "logs: $out" | tee "$out/summary.log"
exit "$failed"
