#!/usr/bin/env bash
# The main job, whole, on this machine's CPU and without a network once the packages are installed:
# text -> tokenizer -> indexed data -> pretraining on 4 ranks, stopped and resumed -> curves ->
# Hugging Face folder -> generated text. At most 10 minutes on 2 cores, after the install.
#
#   bash examples/quickstart.sh                    results in runs/quickstart
#   bash examples/quickstart.sh --steps 400        train longer (default: the run file's steps)
#   bash examples/quickstart.sh --output DIR       results elsewhere
#   bash examples/quickstart.sh --fast             a smaller vocabulary, model and budget: a rehearsal
#
# Run again, it continues where it was and reuses what is there.
set -Eeuo pipefail

usage() { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
wrong() { printf 'quickstart: %s\n' "$*" >&2; usage >&2; exit 2; }

output="" steps="" fast=""
while [ $# -gt 0 ]; do
  case "$1" in
    --steps | --output)
      [ -n "${2:-}" ] || wrong "$1 needs a value"
      if [ "$1" = --steps ]; then steps="$2"; else output="$2"; fi
      shift 2
      ;;
    --fast) fast=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) wrong "$1: unknown option" ;;
  esac
done
case "$steps" in *[!0-9]*) wrong "--steps $steps: must be a whole number" ;; esac
[ -z "$steps" ] || [ "$steps" -ge 10 ] || wrong "--steps $steps: must be 10 or more"
cd_from="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=quickstart
. examples/steps.sh
output="$(cd "$cd_from" && absolute "$output")" || exit 2
started=$(date +%s)

begin 1/9 "Python environment"
bash tools/setup_venv.sh
python="$PWD/.venv/bin/python"
export PYTHONUNBUFFERED=1
# Libraries warn about missing GPU packages; on a CPU that is expected.
export PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error

config=configs/runs/quickstart.yaml
overrides=()
if [ -n "$output" ]; then
  overrides+=(
    "output_directory=$(quoted "$output/run")"
    "data.tokenizer.model=$(quoted "$output/tokenizer/tokenizer.model")"
    "data.sources.0.prefix=$(quoted "$output/data/code_text_document")"
    "data.sources.1.prefix=$(quoted "$output/data/prose_text_document")"
  )
else
  output=runs/quickstart
fi
vocabulary=4096 megabytes=100 new_tokens=80 margin=0.3
if [ -n "$fast" ]; then
  vocabulary=1024 megabytes=1.5 new_tokens=16 steps="${steps:-30}"
  overrides+=(
    "model.vocab_size=$vocabulary" 'model.layer_pattern=ME|+E' training.sequence_length=128
    training.micro_batch_size=2 training.global_batch_size=8 training.validation_batches=2
    "training.validation_interval_steps=$steps" optimizer.schedule.warmup_steps=5
    checkpoint.save_interval_steps=0 logging.interval_steps=1 logging.tensorboard=false
  )
fi
[ -z "$steps" ] || overrides+=("training.steps=$steps")
run="$output/run" data="$output/data" model="$output/hugging_face"
tokenizer="$output/tokenizer/tokenizer.model"

# What is reused must have been made with the same options.
mkdir -p "$output"
settings="steps=${steps:-of the run file} fast=${fast:-no}"
if [ -f "$output/settings" ] && [ "$(cat "$output/settings")" != "$settings" ]; then
  printf 'quickstart: %s was made with other options (%s; now %s):\n' \
    "$output" "$(cat "$output/settings")" "$settings" >&2
  printf '  choose another folder with --output, or remove that one\n' >&2
  exit 2
fi
printf '%s\n' "$settings" >"$output/settings"

begin 2/9 "Text: the standard library's sources (code) and its documentation (prose)"
have "$data/code.jsonl" "$data/prose.jsonl" ||
  python_shown examples/stdlib_text.py --output-directory "$data" --max-megabytes "$megabytes" \
    --overwrite  # of the two, a kill may have left one

begin 3/9 "Tokenizer: SentencePiece, BPE with byte fallback"
have "$tokenizer" ||
  python_shown tools/train_tokenizer.py --input "$data/code.jsonl" "$data/prose.jsonl" \
    --output "$tokenizer" --vocab-size "$vocabulary"

begin 4/9 "Indexed datasets: Megatron's .bin and .idx"
for source in code prose; do
  have "$data/${source}_text_document.bin" "$data/${source}_text_document.idx" ||
    python_shown tools/preprocess_data.py --input "$data/$source.jsonl" \
      --output-prefix "$data/$source" --tokenizer-type SentencePieceTokenizer \
      --tokenizer-model "$tokenizer" --append-eod --workers 2
done

pretrain=(-m equilibrium_mcore.pretrain "$config" ${overrides[@]+"${overrides[@]}"})
progress() { "$python" examples/quickstart_summary.py "$@"; }
expect() { progress "$1" "$run" || { echo "  $run/metrics.jsonl: $2" >&2; false; }; }
total="${steps:-$(sed -n 's/^  steps: *\([0-9]*\).*/\1/p' "$config")}"
half=$((total / 2))

begin 5/9 "Pretraining on 4 ranks, stopped by SIGTERM at about step $half of $total"
if progress stopped "$run"; then
  echo "  done already: $run"
else
  show "${pretrain[@]}"
  attempts=$(progress attempts "$run")
  "$python" "${pretrain[@]}" &
  child=$!
  progress wait "$run" --step "$half" --after-attempts "$attempts" --pid "$child"
  echo "  $ kill -TERM $child"
  kill -TERM "$child"
  status=0
  wait "$child" || status=$?
  child=""
  if [ "$status" -ne 0 ]; then
    echo "  after SIGTERM the run must save and exit with status 0; it exited with $status" >&2
    on_error "$status"
  fi
  expect stopped "no signal is recorded as the cause of its stop"
fi

begin 6/9 "The same command resumes it, to step $total"
if progress finished "$run"; then
  echo "  done already: $run"
else
  train_shown "${pretrain[@]}"
  expect finished "its last event is not the end"
fi

begin 7/9 "Curves"
have "$run/curves.png" || python_shown tools/plot_run.py "$run" --output "$run/curves.png"

begin 8/9 "Hugging Face folder"
have "$model" ||
  python_shown tools/convert_checkpoint.py --checkpoint "$run" --output "$model" \
    --dtype float32 --verify || { rm -rf "$model"; false; }  # not verified: not there

begin 9/9 "Generation with transformers, on the CPU"
python_shown tools/generate.py "$model" --prompt "def read_lines(path):" \
  --max-new-tokens "$new_tokens"

part="the summary"
progress summary "$run" --output "$output" --margin "$margin" \
  --seconds $(($(date +%s) - started))
echo
echo "quickstart: OK"
