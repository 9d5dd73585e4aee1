# Sourced by the scripts beside it: installs the wheels of a folder for the machine's own Python, and says where the checkout is.
#
#   WHEELS=FOLDER; . "$(dirname "$0")/prepare.sh"
#
# Packages go to $SITE and nowhere else.
cache=${XDG_CACHE_HOME:-$HOME/.cache}/munet-gpu
SITE=${SITE:-$cache/site}
for wheel in "$WHEELS"/*.whl; do
    [ ! -e "$wheel" ] || python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" "$wheel"
done
top=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$SITE:$top" PYTHONUNBUFFERED=1
