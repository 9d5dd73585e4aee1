#!/bin/sh
# Runs a whole search on a machine with one GPU, piece by piece: each call goes on where the last one stopped, says how far it is, and ends
# itself within nine minutes. Exit status 0: the search is finished and everything on disk was verified; 75: call again.
#
#   benchmarks/gpu/search.sh WHEELS [EXPERIMENT.toml]
#
# WHEELS holds what that machine's Python with torch lacks: timm, safetensors, pydantic, typer, rich, matplotlib, scikit-learn and whatever
# else `pip` names. The experiment is evolve/recipes/characters.toml by default. Nothing outside $SITE and $WORK is written; $WORK must outlive
# the calls. What `munet-evolve show --json` says goes to $OUT/search.json too, if $OUT is set. DEVICE=cpu tries the script without a GPU;
# SECONDS_A_CALL is how long one call searches.
set -eu
WHEELS=${1:?the folder with the wheels}
. "$(dirname "$0")/prepare.sh"
WORK=${WORK:-$cache/search}
experiment=${2:-$top/evolve/recipes/characters.toml}
mkdir -p "$WORK"
status=0
# The first signal lets the running child end cleanly.
timeout --signal=INT --kill-after=20 "${SECONDS_A_CALL:-480}" \
    python3 -m evolve.cli run "$experiment" --system "$WORK/system" --device "${DEVICE:-cuda}" || status=$?
case $status in
0) echo "finished" ;;
124 | 130 | 137) status=75 ;;
*) exit "$status" ;;
esac
if [ ! -e "$WORK/system/system.json" ]; then
    echo "no time was left to begin: call again" >&2
    exit "$status"
fi
python3 -m evolve.cli show --system "$WORK/system"
[ -z "${OUT:-}" ] || python3 -m evolve.cli show --json --system "$WORK/system" > "$OUT/search.json"
if [ "$status" = 0 ]; then
    python3 -m evolve.cli verify --system "$WORK/system"
else
    echo "not finished: call again" >&2
fi
exit "$status"
