#!/bin/sh
# Measures children trained together on a machine with one GPU: T1 to T5 of benchmarks/train.py, in one call of less than nine minutes.
#
#   benchmarks/gpu/train.sh WHEELS [arguments of benchmarks/train.py]
#
# WHEELS holds what that machine's Python with torch lacks: timm, safetensors, pydantic, scikit-learn, tritonclient and whatever else `pip`
# names. Nothing outside $SITE is written, but the lines to $OUT if that is set. DEVICE=cpu tries the script without a GPU.
set -eu
SITE=${SITE:-${XDG_CACHE_HOME:-$HOME/.cache}/munet-gpu/site}
WHEELS=${1:?the folder with the wheels}
shift
for wheel in "$WHEELS"/*.whl; do
    [ ! -e "$wheel" ] || python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" "$wheel"
done
top=$(cd "$(dirname "$0")/../.." && pwd)
cd "$top"
export PYTHONPATH="$SITE:$top" PYTHONUNBUFFERED=1
exec timeout --kill-after=10 530 python3 -m benchmarks.train --device "${DEVICE:-cuda}" ${OUT:+--results "$OUT"} "$@"
