#!/usr/bin/env bash
# Trains any stage on one node or several, one task per GPU. From the repository root:
#
#   RUN_CONFIG=configs/runs/mine.yaml OUTPUT_DIRECTORY=runs/mine sbatch slurm/train.sh
#   RUN_CONFIG=configs/experiments/sft_template.yaml OUTPUT_DIRECTORY=experiments/sft \
#     sbatch --nodes=4 --account=ACCOUNT slurm/train.sh training.epochs=3
#
# RUN_CONFIG is a run or an experiment file; its stage decides what is trained. Options of sbatch given
# on its command line replace those below. Arguments after the script's name are passed to the
# run as key=value overrides. slurm/pretrain_3b.sh is this script with defaults of its own. Variables:
#
#   RUN_CONFIG         the run, of any stage             required
#   OUTPUT_DIRECTORY   checkpoints and logs; on a file   required, or output_directory=... after
#                      system that all nodes share       the script's name
#   EQUILIBRIUM_ROOT   the repository                    the folder that sbatch was called in
#   VENV               the virtual environment           $EQUILIBRIUM_ROOT/.venv
#   CONTAINER_IMAGE    run in this image instead (enroot/pyxis): a .sqsh file or a registry's name
#   CONTAINER_MOUNTS   more mounts, FROM:TO,...; the repository and OUTPUT_DIRECTORY are mounted
#   SRUN_ARGS          more options of srun, separated by spaces
#
# Pre-emption and the time limit: Slurm sends SIGTERM to every rank, the run saves and exits with
# status 0, and this script requeues the job, which then resumes from what was saved.
# A run that ends, or fails, is not requeued; a job whose node dies is requeued by Slurm.
#
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Without B: in --signal, the ranks get the signal and this script does not. That is also how Slurm
# gives notice of a pre-emption. scancel signals this script too, so a cancelled job stays cancelled.
set -euo pipefail

job_script="${job_script:-train.sh}"  # or the one that reads this file
fail() { printf "$job_script: %s\n" "$@" >&2; exit 1; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a batch script: sbatch slurm/$job_script"
EQUILIBRIUM_ROOT="${EQUILIBRIUM_ROOT:-$SLURM_SUBMIT_DIR}"
[ -d "$EQUILIBRIUM_ROOT/equilibrium_mcore" ] || fail \
  "EQUILIBRIUM_ROOT=$EQUILIBRIUM_ROOT is not the repository: call sbatch there, or set that variable."
cd "$EQUILIBRIUM_ROOT"

RUN_CONFIG="${RUN_CONFIG:-}"
OUTPUT_DIRECTORY="${OUTPUT_DIRECTORY:-}"
for override in "$@"; do
  case "$override" in output_directory=*) OUTPUT_DIRECTORY="${override#*=}" ;; esac
done
[ -n "$RUN_CONFIG" ] || fail "RUN_CONFIG is not set: name a run, e.g. configs/runs/mine.yaml."
[ -n "$OUTPUT_DIRECTORY" ] || fail \
  "OUTPUT_DIRECTORY is not set: name a folder on a file system that all nodes share."
[ -f "$RUN_CONFIG" ] || fail "RUN_CONFIG=$RUN_CONFIG: no such file below $EQUILIBRIUM_ROOT."
case "$OUTPUT_DIRECTORY" in
  "~/"*) OUTPUT_DIRECTORY="$HOME/${OUTPUT_DIRECTORY#"~/"}" ;;  # quoted, so no shell replaced it
  *\$*) fail "output_directory=$OUTPUT_DIRECTORY: write the path out, without a \$." ;;
esac
mkdir -p "$OUTPUT_DIRECTORY"
OUTPUT_DIRECTORY="$(cd "$OUTPUT_DIRECTORY" && pwd)"

# Where the ranks meet. The package takes rank, local rank and world size from srun's variables.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # below the range of ephemeral ports
export MASTER_ADDR MASTER_PORT
# Long and short tensors alternate over a step; segments that can grow keep memory from splintering.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# Triton's kernels, and what their tuning chose, on each node's own disk: a requeued job finds them, and
# hundreds of ranks do not ask one file server. CUDA_DEVICE_MAX_CONNECTIONS follows from the layout.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton_cache_${UID}_$SLURM_JOB_ID}"
export TRITON_CACHE_AUTOTUNING="${TRITON_CACHE_AUTOTUNING:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONUNBUFFERED=1
export PYTHONFAULTHANDLER=1

# --kill-on-bad-exit: one dead rank ends the step, instead of a hang of all others.
srun_args=(--kill-on-bad-exit=1 --label)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun_args+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
if [ -n "${CONTAINER_IMAGE:-}" ]; then
  python=python
  mounts="$EQUILIBRIUM_ROOT:$EQUILIBRIUM_ROOT,$OUTPUT_DIRECTORY:$OUTPUT_DIRECTORY"
  srun_args+=(
    --container-image="$CONTAINER_IMAGE"
    --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    --container-workdir="$EQUILIBRIUM_ROOT"
    --no-container-mount-home
  )
else
  python="${VENV:-$EQUILIBRIUM_ROOT/.venv}/bin/python"
  [ -x "$python" ] || fail \
    "$python is missing: run 'bash tools/setup_venv.sh' on a login node (docs/start/install.md), or set" \
    "VENV or CONTAINER_IMAGE."
fi
read -r -a more_srun_args <<<"${SRUN_ARGS:-}"

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS ranks on" \
  "$SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT, $(date '+%Y-%m-%d %H:%M:%S')"

# srun says how each task ended; tasks' own lines begin with their number (--label).
failures="$(mktemp)"
trap 'rm -f "$failures"' EXIT
keep_failures() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    printf '%s\n' "$line"
    case "$line" in
      *": Terminated" | *": Exited with exit code 143") ;;  # by the signal, or by another's failure
      "srun: error: "*": task "*": "* | "srun: error: "*": tasks "*": "*)
        printf '%s\n' "$line" >>"$failures" ;;
    esac
  done
}
status=0
{
  srun "${srun_args[@]}" ${more_srun_args[@]+"${more_srun_args[@]}"} \
    "$python" -m equilibrium_mcore.train "$RUN_CONFIG" "$@" \
    "output_directory=$OUTPUT_DIRECTORY" 2>&1 >&3 3>&- | keep_failures >&2 3>&-
} 3>&1 || status=$?
requeue() {
  echo "job $SLURM_JOB_ID: $1; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60  # Slurm ends this script; its end of its own would complete the job
}
failed="$(head -n 1 "$failures")"
# 128 + SIGTERM: a signal ended the run before its first step, where there is nothing to save. When a
# rank fails, though, Slurm sends the same signal to the others, and 143 is the highest status.
if [ "$status" -eq 143 ] && [ ! -s "$failures" ]; then
  requeue "stopped by a signal before the first step"
  exit 0
fi
[ "$status" -eq 0 ] || fail "the run failed with status $status; it is not queued again." \
  ${failed:+"$failed"}

# The last attempt's events: a signal among them means that the run saved and stopped because of it.
stopped_by_signal() {
  awk '/"kind": "event"/ {
         if (/"event": "(start|resume)"/) signalled = 0
         if (/"event": "signal"/) signalled = 1
       }
       END { exit !signalled }' "$OUTPUT_DIRECTORY/metrics.jsonl"
}
if stopped_by_signal; then
  requeue "stopped by a signal with everything saved"
else
  echo "job $SLURM_JOB_ID: done"
fi
