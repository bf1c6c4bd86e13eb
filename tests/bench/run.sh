#!/bin/bash
# Every figure that this project promises, measured: ours against what it is compared with, in turn, in one run.
#
#     tests/bench/run.sh [--quick] [FIGURE...]
#
# See README.md beside this, or --help. Fails nothing: each figure is said to be met or missed.
set -euo pipefail
umask 077
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
cd "$top"

for tool in cargo cc python3; do
    type -P "$tool" >/dev/null || {
        echo "bench: there is no $tool here" >&2
        exit 77
    }
done
[[ " $* " == *" --help "* || " $* " == *" -h "* ]] && exec python3 "$here/bench.py" --help

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
helpers=$target/bench
cargo build --release --locked --quiet
mkdir -p "$helpers"
for helper in bare fakecriu replica ticker; do
    # Complete or not at all: another run may be executing the one that is there.
    cc -O2 -Wall -Wextra -pthread -o "$helpers/.$helper.$$" "$here/$helper.c"
    mv "$helpers/.$helper.$$" "$helpers/$helper"
done
exec python3 "$here/bench.py" --relay "$target/release/criu-relay" --helpers "$helpers" "$@"
