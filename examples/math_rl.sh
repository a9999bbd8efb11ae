#!/usr/bin/env bash
# Reinforcement learning from nothing, on this machine's CPU and without a network: sums of two
# numbers, a tokenizer, a small hybrid that is fine-tuned on 2 ranks on the answers of a poor teacher,
# and GRPO with a verifiable reward, which mends them. Minutes on 2 cores.
#
#   bash examples/math_rl.sh                    results in runs/math_rl
#   bash examples/math_rl.sh --output DIR       results elsewhere
#   bash examples/math_rl.sh --fast             a few steps of each: a rehearsal
#
# Run again, it continues where it was and reuses what is there.
set -Eeuo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
wrong() { printf 'math_rl: %s\n' "$*" >&2; usage >&2; exit 2; }

output="" fast=""
while [ $# -gt 0 ]; do
  case "$1" in
    --output)
      [ -n "${2:-}" ] || wrong "$1 needs a value"
      output="$2"
      shift 2
      ;;
    --fast) fast=--fast; shift ;;
    -h | --help) usage; exit 0 ;;
    *) wrong "$1: unknown option" ;;
  esac
done
cd_from="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=math_rl
. examples/steps.sh
output="$(cd "$cd_from" && absolute "${output:-$PWD/runs/math_rl}")" || exit 2

begin 1/6 "Python environment"
bash tools/setup_venv.sh
python="$PWD/.venv/bin/python"
export PYTHONUNBUFFERED=1
# Libraries warn about missing GPU packages; on a CPU that is expected.
export PYTHONWARNINGS=ignore

data="$output/data" tokenizer="$output/tokenizer.model"
begin 2/6 "Sums, some of them held out, and a tokenizer"
# Seed 0 is that of the sums on which the settings were chosen: these are others.
have "$data/prompts.train.jsonl" "$data/text.jsonl" ||
  python_shown examples/arithmetic.py --output-directory "$data" --seed 1
have "$tokenizer" ||
  python_shown tools/train_tokenizer.py --input "$data/text.jsonl" --output "$tokenizer" --vocab-size 512

sft=() grpo=()
if [ -n "$fast" ]; then
  sft=(training.steps=4 optimizer.schedule.warmup_steps=1 logging.tensorboard=false)
  grpo=(
    training.steps=2 training.global_batch_size=16 optimizer.schedule.warmup_steps=1
    evaluation.interval_steps=1 evaluation.prompts=8 logging.tensorboard=false
  )
fi

begin 3/6 "Fine-tuning on 2 ranks: sums, by a teacher who is often one too high"
if "$python" examples/quickstart_summary.py finished "$output/sft"; then
  echo "  done already: $output/sft"
else
  train_shown -m equilibrium_mcore.train configs/runs/math_rl/sft.yaml \
    "output_directory=$(quoted "$output/sft")" \
    "data.tokenizer.model=$(quoted "$tokenizer")" \
    "data.sources.0.train=[$(quoted "$data/sft.train.jsonl")]" \
    "data.sources.0.validation=[$(quoted "$data/sft.validation.jsonl")]" "${sft[@]}"
fi

begin 4/6 "GRPO on 2 ranks: eight answers to each sum, right ones are worth 1"
if "$python" examples/quickstart_summary.py finished "$output/grpo"; then
  echo "  done already: $output/grpo"
else
  train_shown -m equilibrium_mcore.train configs/runs/grpo.yaml \
    "output_directory=$(quoted "$output/grpo")" \
    "checkpoint.initial_weights=$(quoted "$output/sft")" \
    "data.tokenizer.model=$(quoted "$tokenizer")" \
    "data.sources.0.train=[$(quoted "$data/prompts.train.jsonl")]" \
    "data.sources.0.validation=[$(quoted "$data/prompts.validation.jsonl")]" "${grpo[@]}"
fi

begin 5/6 "Curves"
have "$output/grpo/curves.png" || python_shown tools/plot_run.py "$output/grpo" --output "$output/grpo/curves.png"

begin 6/6 "Held-out accuracy along the way"
python_shown examples/math_rl_summary.py "$output/grpo"
echo
echo "math_rl: OK"
