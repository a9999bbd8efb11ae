#!/usr/bin/env bash
# Pretrains the 3B on several nodes, one task per GPU; slurm/train.sh with defaults. From the
# repository root:
#
#   sbatch slurm/pretrain_3b.sh
#   sbatch --nodes=4 --account=ACCOUNT slurm/pretrain_3b.sh training.steps=1000
#
# Options of sbatch given on its command line replace those below. Arguments after the script's name are
# passed to the run as key=value overrides. Variables, all with a default:
#
#   RUN_CONFIG         the run                           configs/runs/pretrain_3b.yaml
#   OUTPUT_DIRECTORY   checkpoints and logs; on a file   runs/pretrain_3b
#                      system that all nodes share
#   EQUILIBRIUM_ROOT   the repository                    the folder that sbatch was called in
#   VENV, CONTAINER_IMAGE, CONTAINER_MOUNTS, SRUN_ARGS: see slurm/train.sh
#
# Pre-emption and the time limit: Slurm sends SIGTERM to every rank, the run saves and exits with
# status 0, and this script requeues the job, which then resumes from what was saved.
# A run that ends, or fails, is not requeued; a job whose node dies is requeued by Slurm.
#
#SBATCH --job-name=pretrain_3b
#SBATCH --nodes=8
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

job_script=pretrain_3b.sh
fail() { printf "$job_script: %s\n" "$@" >&2; exit 1; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a batch script: sbatch slurm/$job_script"
EQUILIBRIUM_ROOT="${EQUILIBRIUM_ROOT:-$SLURM_SUBMIT_DIR}"
# Slurm runs a copy of this file elsewhere, so what it shares with train.sh is read by its path.
[ -f "$EQUILIBRIUM_ROOT/slurm/train.sh" ] || fail \
  "EQUILIBRIUM_ROOT=$EQUILIBRIUM_ROOT is not the repository: call sbatch there, or set that variable."
RUN_CONFIG="${RUN_CONFIG:-configs/runs/pretrain_3b.yaml}"
OUTPUT_DIRECTORY="${OUTPUT_DIRECTORY:-runs/pretrain_3b}"
. "$EQUILIBRIUM_ROOT/slurm/train.sh"
