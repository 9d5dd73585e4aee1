#!/bin/sh
# Runs serve_cuda.py on a machine with a GPU and Python 3.12 with torch, to which files can be brought but which fetches none.
#
#   benchmarks/gpu/serve_cuda.sh WHEELS [arguments of serve_cuda.py]
#   benchmarks/gpu/serve_cuda.sh --keep WHEELS
#
# WHEELS holds what that machine lacks: onnxruntime-gpu, tritonclient, python-rapidjson, prometheus-client, grpcio-health-checking,
# grpcio-reflection, protobuf >= 6.33 < 7 and whatever else `pip` names. A wheel too large to travel at once (onnxruntime-gpu has more than
# 200 MB) comes in pieces made by `split -b 50M NAME.whl NAME.whl.piece-`: `--keep` puts the pieces of one journey aside, the last journey
# joins and installs them. Nothing outside $SITE and $KEPT is written. It ends itself after nine minutes.
set -eu
cache=${XDG_CACHE_HOME:-$HOME/.cache}/munet-gpu
KEPT=${KEPT:-$cache/wheels}
SITE=${SITE:-$cache/site}
mkdir -p "$KEPT"
if [ "${1:-}" = --keep ]; then
    cp "${2:?the folder with the wheels}"/*.whl* "$KEPT"/
    ls -l "$KEPT"
    exit 0
fi
WHEELS=${1:?the folder with the wheels}
shift
for file in "$WHEELS"/*.whl*; do
    [ ! -e "$file" ] || cp "$file" "$KEPT"/
done
for first in "$KEPT"/*.whl.piece-aa; do
    [ -e "$first" ] || continue
    whole=${first%.piece-aa}
    cat "$whole".piece-* > "$whole"
    rm "$whole".piece-*
done
for wheel in "$KEPT"/*.whl; do
    [ ! -e "$wheel" ] || python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" "$wheel"
done
top=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$SITE:$top" PYTHONUNBUFFERED=1
# ONNX Runtime looks for CUDA's libraries beside itself, where the machine's own Python does not keep them.
libraries=$(python3 -c 'import importlib.util as u; s = u.find_spec("nvidia"); print(*[p for p in s.submodule_search_locations] if s else "")' | cut -d " " -f 1)
if [ -n "$libraries" ] && [ ! -e "$SITE/nvidia" ]; then
    mkdir -p "$SITE"
    ln -s "$libraries" "$SITE/nvidia"
fi
exec timeout 540 python3 -W ignore "$top/benchmarks/gpu/serve_cuda.py" "$@"
