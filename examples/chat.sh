#!/usr/bin/env bash
# Fine-tuning, whole, on this machine's CPU and without a network: conversations about Python's standard
# library -> supervised fine-tuning of the quickstart's model on 4 ranks, loss on the answers -> a
# Hugging Face folder with its chat template -> answers before and after, side by side. Minutes on 2
# cores once the quickstart's model exists; otherwise examples/quickstart.sh makes it first.
#
#   bash examples/chat.sh                       results in runs/chat, from the model in runs/quickstart
#   bash examples/chat.sh --quickstart DIR      from another quickstart's model (its --output)
#   bash examples/chat.sh --output DIR          results elsewhere
#   bash examples/chat.sh --fast                a quickstart and a fine-tuning of few steps: a rehearsal
#
# Run again, it continues where it was and reuses what is there.
set -Eeuo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
wrong() { printf 'chat: %s\n' "$*" >&2; usage >&2; exit 2; }

output="" quickstart="" fast=""
while [ $# -gt 0 ]; do
  case "$1" in
    --quickstart | --output)
      [ -n "${2:-}" ] || wrong "$1 needs a value"
      if [ "$1" = --quickstart ]; then quickstart="$2"; else output="$2"; fi
      shift 2
      ;;
    --fast) fast=--fast; shift ;;
    -h | --help) usage; exit 0 ;;
    *) wrong "$1: unknown option" ;;
  esac
done
cd_from="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=chat
. examples/steps.sh
output="$(cd "$cd_from" && absolute "${output:-$PWD/runs/chat}")" || exit 2
quickstart="$(cd "$cd_from" && absolute "$quickstart")" || exit 2

begin 1/7 "Python environment"
bash tools/setup_venv.sh
python="$PWD/.venv/bin/python"
export PYTHONUNBUFFERED=1
# Libraries warn about missing GPU packages; on a CPU that is expected.
export PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error

begin 2/7 "The quickstart's model"
base="${quickstart:-runs/quickstart}"
have "$base/hugging_face/config.json" "$base/run/checkpoints/latest" ||
  bash examples/quickstart.sh $fast ${quickstart:+--output "$quickstart"}

data="$output/data" run="$output/run" model="$output/hugging_face"
begin 3/7 "Conversations from the standard library's documentation"
have "$data/train.jsonl" "$data/validation.jsonl" ||
  python_shown examples/stdlib_chats.py --output-directory "$data" --overwrite

overrides=(
  "output_directory=$(quoted "$run")"
  "checkpoint.initial_weights=$(quoted "$base/run")"
  "data.tokenizer.model=$(quoted "$base/tokenizer/tokenizer.model")"
  "data.sources.0.train=[$(quoted "$data/train.jsonl")]"
  "data.sources.0.validation=[$(quoted "$data/validation.jsonl")]"
)
tokens=60
if [ -n "$fast" ]; then
  tokens=16
  overrides+=(
    model.vocab_size=1024 'model.layer_pattern=ME|+E' training.sequence_length=128
    training.micro_batch_size=2 training.global_batch_size=8 training.epochs=null training.steps=6
    training.validation_interval_steps=3 optimizer.schedule.warmup_steps=2 logging.tensorboard=false
  )
fi

begin 4/7 "Fine-tuning on 4 ranks: the loss is on what the assistant says"
if "$python" examples/quickstart_summary.py finished "$run"; then
  echo "  done already: $run"
else
  train_shown -m equilibrium_mcore.train configs/runs/chat.yaml "${overrides[@]}"
fi

begin 5/7 "Curves"
have "$run/curves.png" || python_shown tools/plot_run.py "$run" --output "$run/curves.png"

begin 6/7 "Hugging Face folders with a chat template: before and after"
have "$output/before/config.json" ||
  python_shown tools/convert_checkpoint.py --checkpoint "$base/run" --output "$output/before" \
    --dtype float32 --chat-template chatml
have "$model/config.json" ||
  python_shown tools/convert_checkpoint.py --checkpoint "$run" --output "$model" --dtype float32

begin 7/7 "Answers of transformers' pipeline, side by side"
python_shown examples/chat_answers.py --before "$output/before" --after "$model" --data "$data" \
  --run "$run" --output "$output/answers.md" --max-new-tokens "$tokens"
echo
echo "  talk to it: python tools/generate.py $model --chat"
echo
echo "chat: OK"
