#!/bin/sh
# Runs the characters benchmark at the published length on a machine with one GPU, piece by piece: each call goes on where the last one
# stopped, prints what is there by then, and ends itself within nine minutes.
#
#   benchmarks/gpu/characters.sh WHEELS [arguments of benchmarks.characters]
#
# WHEELS holds what that machine's Python with torch lacks: timm, safetensors, pydantic, typer, matplotlib, scikit-learn and whatever else
# `pip` names, and for Q3, at the end, onnx, onnxscript, onnxruntime and grpcio with its companions. Without it the runs stop at the first
# import. Nothing outside $SITE and $WORK is written; $WORK must outlive the calls. Lines go to $OUT/characters.jsonl too, if $OUT is set.
set -eu
WHEELS=${1:?the folder with the wheels}
shift
. "$(dirname "$0")/prepare.sh"
WORK=${WORK:-$cache/characters}
cd "$top"
mkdir -p "$WORK"
timeout 540 python3 -m benchmarks.characters --settings benchmarks/settings/characters-gpu.toml --work "$WORK" --minutes 7.5 --workers 8 "$@" \
    > "$WORK/lines.jsonl"
cat "$WORK/lines.jsonl"
[ -z "${OUT:-}" ] || cp "$WORK/lines.jsonl" "$OUT/characters.jsonl"
