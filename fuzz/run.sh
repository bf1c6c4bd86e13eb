#!/usr/bin/env bash
# Runs every fuzz target for SECONDS (default 5). Exit status: 0, nothing found; 1, a crash, whose artifact
# is named; 77, cargo-fuzz or the nightly toolchain is missing.
set -euo pipefail

seconds=${1:-5}
if [[ $# -gt 1 || ! $seconds =~ ^[1-9][0-9]*$ ]]; then
	echo "usage: ${0##*/} [SECONDS]" >&2
	exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")"

missing() {
	echo "fuzzing is not possible here: $1" >&2
	exit 77
}
cargo +nightly --version >/dev/null 2>&1 || missing "no nightly toolchain (rustup toolchain install nightly)"
cargo +nightly fuzz --version >/dev/null 2>&1 || missing "no cargo-fuzz (cargo install cargo-fuzz)"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
fuzz() { cargo +nightly fuzz "$@" >"$log" 2>&1; }

# Only what Cargo.lock names is built, as in a build of criu-relay itself.
cargo +nightly fetch -q --locked
if ! fuzz build; then
	cat "$log" >&2
	exit 1
fi

status=0
for target in $(cargo +nightly fuzz list); do
	mkdir -p "corpus/$target" "artifacts/$target"
	if fuzz run "$target" "corpus/$target" "seeds/$target" -- "-max_total_time=$seconds" -print_final_stats=1; then
		executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
		if [[ -z $executions ]]; then
			echo "$target: it says nothing of what it has done:" >&2
			tail -n 20 "$log" >&2
			exit 1
		fi
		echo "$target: $executions executions in $seconds s, nothing found"
	else
		artifact=$(sed -n 's/^.*Test unit written to //p' "$log" | tail -n 1)
		echo "$target: CRASH, ${artifact:-no artifact was written}"
		grep -m 1 -A 3 'panicked at\|^==[0-9]*== *ERROR' "$log" >&2 || tail -n 20 "$log" >&2
		status=1
	fi
done
exit "$status"
