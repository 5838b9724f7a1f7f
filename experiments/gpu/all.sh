#!/usr/bin/env bash
# One call of at most 9 minutes on a machine with a GPU: its tests, speed, and a training; saved as it goes.
#
# experiments/gpu/all.sh [--dry] [--wheels FOLDER] [--training "SETTINGS"] [--only tests|speed|training]
#
# --dry       everything small, on the CPU
# --wheels    install these first (experiments/gpu/wheels.sh collects them)
# --training  the settings of a task=pretrain, which goes on where an earlier call ended
# --only      one of the three parts
#
# Results go to $OUT (outputs/gpu), work to $WORK (outputs/gpu_work). Results are eight flat files at most: log.txt,
# speed.md, speed.json, the trained weights, a grid of samples, and the checkpoint in parts of 15 MB
# (`cat last.ckpt.* >last.ckpt`, then `--training "... task.resume=last.ckpt"` goes on elsewhere).
set -uo pipefail
cd "$(dirname "$0")/../.."
export OUT=${OUT:-$PWD/outputs/gpu} WORK=${WORK:-$PWD/outputs/gpu_work} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export WANDB_MODE=offline PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
python=$(command -v python3 || command -v python)
dry="" only="" training="model=unet_fashion images=fashion_mnist_32 task.batch_size=256 task.compile=true"
while [ $# -gt 0 ]; do
  case $1 in
    --dry) dry=yes ;;
    --wheels)
      site=$(mktemp -d)
      "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${2:?--wheels needs a folder}"/*.whl || exit 1
      PYTHONPATH=$PYTHONPATH:$site
      shift
      ;;
    --training) training=${2:?--training needs settings} && shift ;;
    --only)
      only=${2-}
      case $only in tests | speed | training) ;; *) echo "--only is tests, speed or training, not '$only'" >&2 && exit 2 ;; esac
      shift
      ;;
    *) echo "unknown: $1" >&2 && exit 2 ;;
  esac
  shift
done
mkdir -p "$OUT" "$WORK"
failed=0 log=$OUT/log.txt

# Seconds of each part: 9 minutes in all, with 15 for the end of each.
tests=125 speed=145 train=225 trainer=gpu
quick=(tests/gpu) small=()
if [ -n "$dry" ]; then
  export OSS_EXP_GPU_TESTS=cpu OMP_NUM_THREADS=1
  tests=900 speed=600 train=600 trainer=cpu small=(--dry)
  quick=(tests/gpu -k "search_of_an_exact or flux_dev or host_memory")
  training="model=dit_fashion images=digits model.event_shape=[1,8,8] model.backbone.size=8 task.batch_size=8"
  training+=" model.backbone.num_layers=1 task.max_steps=4 task.save_every=2 task.warmup_steps=1"
fi

part() { # NAME SECONDS COMMAND...: run it for so long
  local seconds=$2 name=$1 code
  shift 2
  [ -z "$only" ] || [ "$only" = "$name" ] || return 0
  echo "== $name, at most $seconds s, from $(date +%T)" | tee -a "$log"
  timeout --signal TERM --kill-after 15 "$seconds" "$@" >>"$log" 2>&1
  code=$?
  tail -n 15 "$log"
  echo "== $name ended with $code, at $(date +%T)" | tee -a "$log"
  return $code
}

collect() { # the training's files, which lie deep
  local weights grid
  weights=$(ls "$WORK"/training/*.safetensors 2>/dev/null | head -n 1)
  grid=$(ls "$WORK"/training/samples/step_*.png 2>/dev/null | tail -n 1)
  [ -z "$weights" ] || cp "$weights" "$OUT/weights.safetensors"
  [ -z "$grid" ] || cp "$grid" "$OUT/samples.png"
  [ -f "$WORK/training/checkpoints/last.ckpt" ] || return 0
  rm -rf "$WORK/parts" && mkdir "$WORK/parts"
  split --bytes 15M "$WORK/training/checkpoints/last.ckpt" "$WORK/parts/last.ckpt."
  rm -f "$OUT"/last.ckpt.*  # those of an earlier checkpoint, which may be more
  mv "$WORK"/parts/last.ckpt.* "$OUT"
}

{
  date && "$python" --version
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1
  echo "missing packages:" && "$python" experiments/gpu/missing.py
} >"$log" 2>&1
cat "$log"

part tests "$tests" "$python" -m pytest -q -n 0 -p no:cacheprovider -m gpu "${quick[@]}" || failed=1
part speed "$speed" "$python" -m experiments.gpu_speed.run --output "$OUT" --seconds $((speed - 30)) "${small[@]}" ||
  failed=1

# A signal ends a training with all its steps kept; the next call goes on.
rm -f "$WORK/ended"
trap 'touch "$WORK/ended"' EXIT
(
  seconds=0
  until [ -e "$WORK/ended" ]; do
    sleep 1 && seconds=$((seconds + 1))
    [ $((seconds % 20)) -ne 0 ] || collect
  done
) &
collector=$!
# shellcheck disable=SC2086  # settings are words
part training "$train" "$python" -m oss_exp task=pretrain $training trainer=$trainer logger=none \
  hydra.run.dir="$WORK/training"
code=$?
touch "$WORK/ended" && wait $collector
case $code in 0 | 124 | 143) ;; *) failed=1 ;; esac
collect
ls -l "$OUT"
exit $failed
