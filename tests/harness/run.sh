#!/bin/bash
# The fault harness: see README.md beside it.
#
#     tests/harness/run.sh [--commit stored|restored] [--runs N] [--seed S] [--fault NAME] [--phase NAME]
#                          [--jobs N] [--seconds N] [--view] [--keep]
#
# Exit status: 0 nothing was lost and nothing ran twice; 77 CRIU can't run here; anything else is a failure.
set -euo pipefail
umask 077
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."

if [[ $(id -u) != 0 ]]; then
    echo "harness: CRIU needs root, and this is user $(id -u)." >&2
    exit 77
fi
for program in cc python3; do
    type -P "$program" >/dev/null || {
        echo "harness: there is no $program." >&2
        exit 77
    }
done
cargo build --release --locked --quiet
relay=$(realpath "${CARGO_TARGET_DIR:-target}/release/criu-relay")
status=0
tests/fetch-criu.sh || status=$?
[[ $status == 0 ]] || exit "$status" # it has said why

tools=$PWD/target/harness
mkdir -p "$tools"
cc -O2 -Wall -pthread -o "$tools/ticker" "$here/ticker.c"
cc -O2 -Wall -o "$tools/host" "$here/host.c"
cc -O2 -Wall -o "$tools/steps" "$here/steps.c"
exec python3 "$here/harness.py" --relay "$relay" --criu "$PWD/target/criu/criu" --tools "$tools" "$@"
