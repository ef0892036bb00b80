#!/usr/bin/env bash
# Every check that needs a GPU, in one call of at most nine minutes: the CUDA tests, then the table of training steps.
#
#     OUT=results bash benchmarks/gpu.sh [--wheels FOLDER] [--device cpu]
#
# Writes $OUT/log.txt, $OUT/tests.xml, $OUT/NAME.json and NAME.md for each table. --wheels installs the .whl files of a folder
# first, for a machine without network. --device cpu tries the script itself, with a tiny network.
# A part that fails does not stop the others; the exit code is that of the tests.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda wheels=""
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    *) echo "unknown option $1: allowed are --device and --wheels" >&2; exit 2 ;;
  esac
done
out=${OUT:-results}
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
started=$SECONDS
left() { echo $((530 - (SECONDS - started))); }  # seconds, of nine minutes
within() {  # run a command for as long as time is left
  if [ "$(left)" -lt 15 ]; then echo "no time left for: $*"; return; fi
  timeout --kill-after=5 "$(left)" "$@" || echo "failed ($?): $*"
}
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit
  export PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" -c "import torch; print('torch', torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"

echo "== tests"
timeout --kill-after=5 150 "$python" -m pytest -q -k cuda --junitxml "$out/tests.xml" tests/training/test_cuda.py
tests=$?

step() {  # NAME, then options of the benchmark; later tables get what time is left
  local name=$1; shift
  echo "== $name ($(left) s left)"
  within "$python" benchmarks/train_step.py --device "$device" --out "$out/$name.json" "$@"
}
if [ "$device" = cpu ]; then
  step tiny --models SiT-S/8 --batch 2 --latent 16 --width 64 --layers 1 --teachers cached online --rounds 1
else
  step xl-online --models SiT-XL/2 --batch 128 --teachers online --compiled --rounds 3  # the target: 400 images a second
  step table --models SiT-B/2 SiT-L/2 --batch 256 --teachers cached online --compiled --rounds 3
  step xl-cached --models SiT-XL/2 --batch 128 --teachers cached --rounds 3
  step plain --models SiT-B/2 --batch 64 --teachers online --plain --rounds 3
  within "$python" benchmarks/adaln.py --model SiT-XL/2 --batch 256
fi
echo "== $((SECONDS - started)) s; the tests ended with $tests"
exit $tests
