#!/usr/bin/env bash
# Everything that can be checked, in one go: README's second command, and what .ci/run runs. It installs what
# it needs where that can be done (root, a Debian with apt); what a machine can't run is reported as SKIPPED,
# by name and with the reason. Needs cargo; for the fuzzers a nightly toolchain.
set -euo pipefail
cd "$(dirname "$0")/.."

skipped=()
skip() { # NAME REASON
	echo "SKIPPED $1: $2"
	skipped+=("$1")
}

step() {
	echo
	echo "== $* =="
}

need() { # PROGRAM PACKAGE
	command -v "$1" >/dev/null && return
	if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		[ -n "${updated:-}" ] || { apt-get -qq update && updated=1; }
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$2" >/dev/null || true
	fi
}

step "what the tests need"
need cc gcc
need c++ g++
need mandoc mandoc
need ip iproute2
need unshare util-linux
need python3 python3-minimal
if ! cargo fuzz --version >/dev/null 2>&1; then
	cargo install --quiet --locked cargo-fuzz || true
fi
rustup component add rustfmt clippy >/dev/null 2>&1 || true
for program in cc mandoc ip unshare; do
	printf '%-10s %s\n' "$program" "$(command -v $program || echo missing)"
done

step "format and lints"
cargo fmt --check
cargo clippy --locked --all-targets --quiet -- -D warnings

step "release build"
cargo build --locked --release
binary=${CARGO_TARGET_DIR:-target}/release/criu-relay
size=$(stat -c %s "$binary")
echo "$binary: $size bytes"
if [ "$size" -gt $((1536 * 1024)) ]; then
	echo "the release binary is larger than 1.5 MiB"
	exit 1
fi

step "tests"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
cargo test --locked --no-fail-fast 2>&1 | tee "$log" || status=$?
while IFS= read -r line; do
	name=${line#SKIPPED }
	skipped+=("${name%%:*}")
done < <(grep -aoE 'SKIPPED [a-z0-9_]+: .*' "$log" || true)

step "fuzzers, a short run of each"
fuzz=0
fuzz/run.sh "${FUZZ_SECONDS:-5}" || fuzz=$?
case $fuzz in
0) ;;
77) skip fuzzers "see above" ;;
*) status=1 ;;
esac

step "the demonstration"
demo=0
tests/demo.sh || demo=$?
case $demo in
0) ;;
77) skip demonstration "see above" ;;
*) status=1 ;;
esac

step "the fault harness, a short run without a view and one with it"
seconds=${HARNESS_SECONDS:-75}
harness=0
tests/harness/run.sh --runs 1000 --seconds $((seconds * 3 / 5)) || harness=$?
if [ "$harness" = 0 ]; then
	# With it, nothing is ever lost with the weaker commit point either.
	tests/harness/run.sh --commit stored --view --runs 1000 --seconds $((seconds * 2 / 5)) || harness=$?
fi
case $harness in
0) ;;
77) skip "fault harness" "see above" ;;
*) status=1 ;;
esac

count() { awk -v what="$1" '$1 == "test" && $2 == "result:" { for (i = 3; i < NF; i++) if ($(i + 1) ~ "^" what) sum += $i } END { print sum + 0 }' "$log"; }
passed=$(count passed)
failed=$(count failed)
step "result"
for name in "${skipped[@]}"; do echo "skipped: $name"; done
[ "$failed" = 0 ] && [ "$status" != 0 ] && failed=1
# A test that skips itself counts as passed above.
echo "$((passed - ${#skipped[@]})) passed, $failed failed, ${#skipped[@]} skipped"
exit "$status"
