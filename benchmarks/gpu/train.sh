#!/bin/sh
# Measures children trained together on a machine with one GPU: T1 to T5 of benchmarks/train.py,
# and the ways to compute a step of benchmarks/training_choices.py, in one call of less than nine minutes.
#
#   benchmarks/gpu/train.sh WHEELS [arguments of benchmarks/train.py]
#
# WHEELS holds what that machine's Python with torch lacks: timm, safetensors, pydantic, scikit-learn, tritonclient and whatever else `pip`
# names. Nothing outside $SITE is written, but the lines to $OUT if that is set. DEVICE=cpu tries the script without a GPU.
set -eu
WHEELS=${1:?the folder with the wheels}
shift
. "$(dirname "$0")/prepare.sh"
cd "$top"
timeout --kill-after=10 400 python3 -m benchmarks.train --device "${DEVICE:-cuda}" ${OUT:+--results "$OUT"} "$@"
exec timeout --kill-after=10 130 python3 -m benchmarks.training_choices --device "${DEVICE:-cuda}" ${OUT:+--results "$OUT"}
