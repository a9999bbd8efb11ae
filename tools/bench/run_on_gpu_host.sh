#!/usr/bin/env bash
# Everything that needs a GPU, in seven parts: the comparisons of tests/gpu, and the benchmark. For a host
# with torch and one GPU, also one without internet: packages that it lacks come from archives, unpacked
# for PYTHONPATH (a host that has them needs no .gpu folder):
#
#   mkdir -p .gpu && cp SITE.tar.xz .gpu/        # .gpu is ignored by git
#   OUT=runs/gpu bash tools/bench/run_on_gpu_host.sh                  all parts, 38 minutes at most
#   OUT=runs/gpu bash tools/bench/run_on_gpu_host.sh first layers     these parts, in this order
#   bash tools/bench/run_on_gpu_host.sh --rehearse                    all of it on a CPU, at a tiny size
#
#   first       120 s   report of the host; a Triton kernel, a linear layer, attention, a Mamba mixer
#   layers      400 s   every layer against the reference
#   model       400 s   the whole model and faster kernels against the reference
#   training    240 s   kernel certificate; training in bf16 and FP8; a checkpoint resumed
#   expert_rank 480 s   roofs; one of 8 expert ranks: plain, fused, weight gradients, CUTLASS
#   blocks      240 s   a third of the model: gradients reduced during backward; FP8
#   details     400 s   what bounds each layer: kernels, or the host that starts them; a step's kernels
#
# Each is short enough for a call of ten minutes. A part that fails, or passes its limit, does not end the
# others. Logs and figures lie in $OUT, one line per part in $OUT/summary.txt, which is printed last. The
# exit status is the number of parts that failed. LIMIT_SECONDS replaces every limit.
#
# What Triton compiled and chose lies in $TRITON_CACHE_DIR, is kept for the next call, and comes back as
# $OUT/triton_cache.tgz: put into .gpu, it saves another host the tuning.
set -uo pipefail

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"
out="${OUT:-runs/gpu}"
site="${SITE:-${TMPDIR:-/tmp}/equilibrium_gpu_site}"
rehearse=""
[ "${EQUILIBRIUM_GPU_REHEARSAL:-0}" = 1 ] && rehearse="--rehearse"
[ "${1:-}" = --rehearse ] && { rehearse="--rehearse"; shift; }
[ -z "$rehearse" ] || export EQUILIBRIUM_GPU_REHEARSAL=1
mkdir -p "$out"
out="$(cd "$out" && pwd)"

for archive in .gpu/*.tar.xz; do
  [ -e "$archive" ] || continue
  done_mark="$site/.unpacked_$(basename "$archive")"
  [ -e "$done_mark" ] && continue
  mkdir -p "$site" && tar -xJf "$archive" -C "$site" && touch "$done_mark" || exit 1
done
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# mamba-ssm tunes its scan over some hundred configurations for each shape and dtype.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$site.triton_cache}" TRITON_CACHE_AUTOTUNING=1
if [ ! -d "$TRITON_CACHE_DIR" ]; then
  mkdir -p "$TRITON_CACHE_DIR" || exit 1
  [ ! -e .gpu/triton_cache.tgz ] || tar -xzf .gpu/triton_cache.tgz -C "$TRITON_CACHE_DIR" || exit 1
fi

failed=0
run_part() {  # name, seconds, command...
  local name="$1" limit="${LIMIT_SECONDS:-$2}" started=$SECONDS status
  shift 2
  echo "== $name, at most $limit s: $*"
  timeout --kill-after=15 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed=$((failed + 1))
  echo "$name: exit $status, $((SECONDS - started)) s" >>"$out/summary.txt"
}
# One order of summation, and one configuration of each kernel without tuning, where numbers are compared.
tests() {
  MAMBA_DETERMINISTIC=1 "$python" -m pytest -p no:cacheprovider -p no:logging -W ignore -m gpu -s \
    --durations=12 "$@"
}
bench() { "$python" tools/bench/gpu.py --part "$1" --json "$out/$1.json" $rehearse; }
first() {
  local status=0
  "$python" -m equilibrium_mcore.parallel.host || status=$?
  tests tests/gpu/test_first.py tests/gpu/test_layers.py \
    -k "test_first or (bf16 and (column or mixer)) or 1024" || status=$?
  return "$status"
}
layers() { tests tests/gpu/test_layers.py; }
model() { tests tests/gpu/test_model.py tests/gpu/test_fused.py; }
training() { tests tests/gpu/test_kernels.py tests/gpu/test_training.py -k "not delayed and not blockwise"; }
export -f tests bench first layers model training
export python out rehearse

: >"$out/summary.txt"
[ $# -gt 0 ] || set -- first layers model training expert_rank blocks details
for part in "$@"; do
  case "$part" in
    first) run_part first 120 bash -c first ;;
    layers) run_part layers 400 bash -c layers ;;
    model) run_part model 400 bash -c model ;;
    training) run_part training 240 bash -c training ;;
    expert_rank) run_part expert_rank 480 bash -c "bench expert_rank" ;;
    blocks) run_part blocks 240 bash -c "bench blocks" ;;
    details) run_part details 400 bash -c "bench details" ;;
    roofs | bf16 | fp8) run_part "$part" 540 bash -c "bench $part" ;;
    *) echo "unknown part $part: first layers model training expert_rank blocks details roofs bf16 fp8" >&2; exit 64 ;;
  esac
done
tar -czf "$out/triton_cache.tgz" -C "$TRITON_CACHE_DIR" .
cat "$out/summary.txt"
exit "$failed"
