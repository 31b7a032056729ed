#!/usr/bin/env bash
# Test, time and tune fastkl on a machine with one NVIDIA GPU, in under nine minutes and without network.
#
#   bash bench/gpu.sh              all stages; results go to $OUT (bench/results/<card>), at most eight files
#   bash bench/gpu.sh --dry-run    the same stages at small sizes; without a GPU, in Triton's interpreter
#   STAGES="smoke timing" bash bench/gpu.sh
#
# Each stage has a time limit, so that a hang loses only that stage; the most valuable stages come first. The exit
# status is 1 if a stage failed. The limits add up to more than TOTAL (530 seconds): if all are reached, the last stages
# get less time. PYTHON (python3), JOBS (cores), TOTAL, and COMMIT for a copy without git may be set.
[ -n "${OUT:-}" ] && { mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1; }
cd "$(dirname "$0")/.." || exit 1
DRY=""
case "${1:-}" in
  --dry-run) DRY=1 ;;
  "") ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
: "${PYTHON:=python3}" "${JOBS:=$(nproc)}" "${TOTAL:=530}"
: "${STAGES:=about smoke host timing tune tests step training}"
began=$SECONDS
scratch=$(mktemp -d) linked=""
cleanup() { rm -rf "$scratch"; if [ -n "$linked" ]; then rm -f fastkl/kernels; fi; }
trap cleanup EXIT
if [ ! -e fastkl/kernels ]; then  # runs the package from this folder, without an install
  ln -sfn ../kernels fastkl/kernels && linked=1
fi
export PYTHONPATH="$PWD:$PWD/tests" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 KINETO_LOG_LEVEL=99
kept=${TMPDIR:-/tmp}/fastkl-gpu-$(id -u)  # compiled code, reused by a second run
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$kept/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$kept/inductor}"
export PYTHON JOBS DRY
if [ -z "$DRY" ] && ! timeout 60 $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no GPU; --dry-run runs the script without one" >&2
  exit 1
fi
if [ -z "${OUT:-}" ]; then
  card=$(timeout 60 $PYTHON -m bench.about --slug) || exit 1
  OUT=bench/results/$card${DRY:+-quick}
fi
export OUT
mkdir -p "$OUT" || exit 1
log=$OUT/log.txt
: > "$log"
if [ -n "$DRY" ] && ! nvidia-smi -L > /dev/null 2>&1; then
  export TRITON_INTERPRET=1
fi

summary=() failed=0
stage() {  # name, seconds, command
  local name=$1 limit=$2 left=$((TOTAL - SECONDS + began)) start=$SECONDS code result
  shift 2
  [[ " $STAGES " == *" $name "* ]] || return 0
  echo "== $name" | tee -a "$log"
  if [ "$left" -lt 10 ]; then
    result="NOT RUN: no time left" failed=1
  else
    [ -n "$DRY" ] && limit=$((3 * limit))  # a machine without a GPU may be slow
    [ "$limit" -gt "$left" ] && limit=$left
    export LIMIT=$limit
    # SIGINT first: pytest then prints the failures so far, which takes some seconds.
    timeout --signal=INT --kill-after=12 "$limit" "$@" 2>&1 | tee -a "$log" | tail -n "${SHOW:-60}"
    code=${PIPESTATUS[0]}
    case $code in
      0) result=ok ;;
      124 | 137) result="STOPPED at its limit of $limit s" failed=1 ;;
      *) result="FAILED, exit status $code" failed=1 ;;
    esac
  fi
  summary+=("-- $name: $result ($((SECONDS - start)) s)")
  echo "${summary[-1]}" | tee -a "$log"
}

about() { $PYTHON -m bench.about --out "$OUT/about.json"; }

smoke() {
  if [ -n "$DRY" ]; then
    $PYTHON -m bench.smoke --small ${TRITON_INTERPRET:+--interpreted} --jobs 1 --out "$OUT/smoke.jsonl"
    return
  fi
  local checker="" code
  if command -v compute-sanitizer > /dev/null; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=3 $((LIMIT - 8)) \
      compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 "$PYTHON" -m bench.smoke --sanitized > "$scratch/sanitizer" 2>&1 &
    checker=$!
  fi
  $PYTHON -m bench.smoke --jobs "$JOBS" --seconds $((LIMIT - 12)) --out "$OUT/smoke.jsonl"
  code=$?
  [ -z "$checker" ] && { echo "compute-sanitizer is missing: memory accesses were not checked"; return $code; }
  wait "$checker"
  case $? in
    0) echo "ok   compute-sanitizer memcheck" ;;
    9) echo "FAIL compute-sanitizer memcheck"; grep -m 20 '=====' "$scratch/sanitizer"; code=1 ;;
    *) echo "compute-sanitizer did not end, or does not work on this machine:"; tail -n 3 "$scratch/sanitizer" ;;
  esac
  return $code
}

run_tests() {  # pytest's arguments; uses all cores if pytest-xdist is installed
  local given=(-q -ra --tb=short -p no:cacheprovider -o addopts= --import-mode=importlib "$@")
  if ! $PYTHON -c 'import pytest' 2> /dev/null; then
    echo "pytest is missing: no tests"
    return 1
  fi
  if [ "$JOBS" -gt 1 ] && [ -z "$DRY" ] && $PYTHON -c 'import xdist' 2> /dev/null; then
    $PYTHON -m pytest "${given[@]}" -n "$JOBS" --dist worksteal --maxfail 60
  else
    echo "one process: pytest-xdist is missing, or JOBS is 1, or this is a dry run"
    $PYTHON -m pytest "${given[@]}" --maxfail 60
  fi
}

host() {  # the figures first, because tests without compiled kernels in the cache may take all the time
  local code=0
  $PYTHON -m bench.host --seconds $((LIMIT / 2)) --out "$OUT/host.csv" \
    ${DRY:+--only kl_normal rsample_kl --rounds 2 --calls 5} || code=1
  run_tests tests/test_host_path.py -k on_a_gpu || code=1
  return $code
}

timing() {
  $PYTHON -m bench.gpu --jobs "$JOBS" --seconds $((LIMIT - 8)) --out "$OUT/timing.csv" \
    ${DRY:+--small --no-compile --jobs 1 --rounds 3}
}

tune() {
  $PYTHON -m bench.tune --jobs "$JOBS" --seconds $((LIMIT - 8)) --out "$OUT/tune.csv" --table "$OUT/tuned.py" \
    ${DRY:+--small --op kl_normal gmm_dot --dtype float32 --tile 256x4}
}

# `torch` and `native` variants do not depend on the GPU; two processes of a group cannot share one GPU through NCCL.
KERNELS="kl_normal kl_normal_per_dim wasserstein2_normal rsample_kl distributions edges gumbel_softmax gumbel_softmax_noise
  normal_log_prob bernoulli_log_prob gmm_log_prob gmm_log_prob_shapes gmm_log_prob_accuracy gmm_kernels gmm_dot gmm_full
  gmm_per_datum gmm_moments kl_gmm kl_gmm_bounds mixtures mmd mmd_normal total_correlation sinkhorn_divergence sliced_wasserstein
  contract"
export KERNELS
tests() {
  local name file files=()
  [ -n "$DRY" ] && { run_tests tests/normal/test_kl_normal.py -k "test_shapes and 37 and None-triton"; return; }
  for name in $KERNELS; do
    file=$(find tests -name "test_$name.py")
    if [ -n "$file" ]; then files+=("$file"); else echo "no test_$name.py"; fi
  done
  run_tests "${files[@]}" -k "not torch] and not torch- and not native] and not native- and not group"
}

step() { $PYTHON -m bench.real_step --seconds $((LIMIT / 2)) --out "$OUT/step.csv" ${DRY:+--small}; }

# A training run on photographs; its packages may be missing on a machine without network. PSNR and times are in the log.
training() {
  local missing
  missing=$($PYTHON -c 'from importlib.util import find_spec as found
print(*[name for name in ("skimage", "sklearn", "rich", "matplotlib") if found(name) is None])') || return 1
  [ -z "$missing" ] || { echo "missing: $missing; no training run"; return 0; }
  $PYTHON -m fastkl train --preset large-latent --image-size 256 --precision bf16 --steps 300 --no-tensorboard \
    --out "$scratch/run" ${DRY:+--image-size 32 --steps 2 --hidden 4 --test-count 4 --importance-samples 2}
}

export -f about smoke run_tests host timing tune tests step training
export scratch
stage about 20 bash -c about
stage smoke 110 bash -c smoke
stage host 60 bash -c host
stage timing 150 bash -c timing
stage tune 90 bash -c tune
stage tests 120 bash -c tests
stage step 60 bash -c step
stage training 60 bash -c training
{
  echo "== all: $((SECONDS - began)) s, results in $OUT"
  printf '%s\n' "${summary[@]}"
} | tee -a "$log"
exit "$failed"
