#!/usr/bin/env bash
# Everything that needs a GPU, in parts of at most 9 minutes: the comparisons of tests/gpu, and the
# benchmark. For a host with torch and a GPU, also one without internet: packages that it lacks come
# from archives, unpacked for PYTHONPATH (a host that has them needs no .gpu folder):
#
#   mkdir -p .gpu && cp SITE.tar.xz .gpu/        # .gpu is ignored by git
#   OUT=runs/gpu bash tools/bench/run_on_gpu_host.sh                  all parts, one after another
#   OUT=runs/gpu bash tools/bench/run_on_gpu_host.sh layers training  these parts: see `case` below
#
# A part that fails does not stop the others. Logs and figures lie in $OUT, one line per part in
# $OUT/summary.txt, which is printed last. The exit status is the number of parts that failed.
# EQUILIBRIUM_GPU_REHEARSAL=1 rehearses all of it on a CPU, at a tiny size.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"
out="${OUT:-runs/gpu}"
site="${SITE:-${TMPDIR:-/tmp}/equilibrium_gpu_site}"
limit="${LIMIT_SECONDS:-540}"
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
export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

failed=0
run_part() {  # name, command...
  local name="$1" started=$SECONDS status
  shift
  echo "== $name: $*"
  timeout --kill-after=15 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed=$((failed + 1))
  echo "$name: exit $status, $((SECONDS - started)) s" >>"$out/summary.txt"
}
tests() { "$python" -m pytest -p no:cacheprovider -W ignore -m gpu -s "$@"; }
bench() { "$python" tools/bench/gpu.py --part "$1" --json "$out/$1.json" $rehearse; }
rehearse=""
[ "${EQUILIBRIUM_GPU_REHEARSAL:-0}" = 1 ] && rehearse="--rehearse"
export -f tests bench
export python out rehearse

: >"$out/summary.txt"
[ $# -gt 0 ] || set -- environment layers training bf16 fp8
for part in "$@"; do
  case "$part" in
    environment) run_part environment "$python" -m equilibrium_mcore.parallel.host ;;
    layers) run_part layers bash -c "tests tests/gpu/test_layers.py tests/gpu/test_model.py tests/gpu/test_kernels.py" ;;
    training) run_part training bash -c "tests tests/gpu/test_training.py" ;;
    roofs | bf16 | fp8) run_part "$part" bash -c "bench $part" ;;
    *) echo "unknown part $part: environment layers training roofs bf16 fp8" >&2; exit 64 ;;
  esac
done
cat "$out/summary.txt"
exit "$failed"
