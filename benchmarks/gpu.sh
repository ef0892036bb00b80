#!/usr/bin/env bash
# Runs every check that needs a GPU in at most nine minutes: the CUDA tests, then benchmarks/gpu.py, the long form of
# `repa bench`.
#
#     OUT=results bash benchmarks/gpu.sh [--wheels FOLDER] [--device cpu]
#
# Writes $OUT/log.txt, $OUT/tests.xml, $OUT/gpu.json (complete after each row) and $OUT/trace.json.gz.
# --wheels first installs the .whl files of a folder, for a machine without network.
# --device cpu tries the script with a tiny network.
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
left() { echo $((530 - (SECONDS - started))); }  # seconds left of nine minutes
within() {  # run a command in the time that is left
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

echo "== measure ($(left) s left)"
trace=()
[ "$device" = cpu ] || trace=(--trace "$out/trace.json.gz")
within "$python" benchmarks/gpu.py --device "$device" --out "$out/gpu.json" --seconds "$(($(left) - 10))" ${trace[@]+"${trace[@]}"}
if [ "$device" != cpu ]; then
  within "$python" benchmarks/adaln.py --model SiT-XL/2 --batch 256
fi
echo "== $((SECONDS - started)) s; the tests ended with $tests"
exit $tests
