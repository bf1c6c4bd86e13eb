#!/bin/bash
# Migrates a real process on this one host, and tells what happens. As root, from anywhere:
#
#     tests/demo.sh
#
# Exit status: 0 the process went on, verified; 77 CRIU can't run here; anything else is a failure.
set -euo pipefail
umask 077
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mib=256
started=()
scratch=
view=

say() { printf '%s\n' "$*"; }
fail() {
    say "FAILED: $*" >&2
    exit 1
}

cleanup() {
    local status=$? log
    trap - EXIT
    if [[ $status != 0 && $status != 77 && -n $scratch ]]; then
        for log in "$scratch"/*.log "$scratch"/*/*.log; do
            [[ -s $log ]] && { say "--- ${log#"$scratch"/}" && tail -n 15 "$log"; } >&2
        done
    fi
    # Those that have not been seen to end.
    for pid in ${started[@]+"${started[@]}"}; do
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait 2>/dev/null || true
    [[ -z $view ]] || rm -rf "$view"
    [[ -z $scratch ]] || rm -rf "$scratch"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# start NAME COMMAND...: in the background; its pid in $pid, what it prints in NAME.out and NAME.log.
start() {
    local name=$1
    shift
    "$@" </dev/null >"$scratch/$name.out" 2>"$scratch/$name.log" &
    pid=$!
    started+=("$pid")
}

# until_true SECONDS WHAT COMMAND...
until_true() {
    local deadline=$((SECONDS + $1 + 1)) what=$2
    shift 2
    until "$@" 2>/dev/null; do
        ((SECONDS < deadline)) || fail "waited in vain for $what"
        sleep 0.02
    done
}
has_ended() { ! kill -0 "$1" 2>/dev/null; }

# until_ended PID NAME
until_ended() {
    local i
    until_true 60 "the end of $2" has_ended "$1"
    for i in "${!started[@]}"; do
        [[ ${started[i]} != "$1" ]] || unset "started[i]"
    done
}

# exit_status PID NAME: waits for its end; the status is in $status.
exit_status() {
    until_ended "$1" "$2"
    status=0
    wait "$1" || status=$?
}

# ask: has the process check all of its memory; its own counter is in $counter.
ask() {
    rm -f "$scratch/app/answer"
    : >"$scratch/app/ask"
    until_true 30 "an answer of the process" test -e "$scratch/app/answer"
    local answer
    answer=$(<"$scratch/app/answer")
    [[ $answer == "ok counter="*" pid=$process "* ]] || fail "the process answers: $answer"
    counter=${answer#ok counter=}
    counter=${counter%% *}
}

# --- what is needed

if [[ $(id -u) != 0 ]]; then
    say "CRIU needs root, and this is user $(id -u)." >&2
    exit 77
fi
say "Building criu-relay, and getting a CRIU that runs here (target/criu) ..."
cargo build --release --locked
relay=$(realpath "${CARGO_TARGET_DIR:-target}/release/criu-relay")
status=0
tests/fetch-criu.sh || status=$?
[[ $status == 0 ]] || exit "$status" # it has said why
criu=$PWD/target/criu/criu
if [[ $(stat -f -c %T /dev/shm 2>/dev/null) != tmpfs ]]; then
    say "The images are kept on a tmpfs, and there is none at /dev/shm." >&2
    exit 77
fi
scratch=$(mktemp -d)
view=$(mktemp -d /dev/shm/criu-relay-demo-XXXXXX)
mkdir "$scratch"/{app,source,target}
cc -O2 -pthread -o "$scratch/migrant" tests/migrant.c

# --- the destination

start cache "$relay" cache -D "$scratch/target" --view "$view" --persist --port 0
cache=$pid
until_true 10 "the cache" test -s "$scratch/cache.out"
address=$(<"$scratch/cache.out")
say "destination: criu-relay cache listens at $address, and will show the images in $view"

# As soon as the images are there: the process runs first, and its memory is filled in from the cache's.
cat >"$scratch/restore.sh" <<EOF
"$relay" wait -D "$view" >/dev/null &&
"$criu" lazy-pages -D "$view" -W "$scratch/target" -v4 -o lazy.log --daemon --pidfile lazy.pid &&
exec "$criu" restore --lazy-pages -D "$view" -W "$scratch/target" --action-script "$relay" -v4 -o restore.log
EOF
start restore unshare -pf --mount-proc --kill-child bash "$scratch/restore.sh"
restore=$pid
waits() { grep -q " 03 .* $view/relay-cache.sock\$" /proc/net/unix; }
until_true 10 "criu-relay wait" waits
say "destination: criu-relay wait stands for a lazy criu restore, in a PID namespace of its own"

# --- the source

start proxy "$relay" proxy -D "$scratch/source" --port "${address##*:}"
proxy=$pid
until_true 10 "the link" grep -q 'connected to' "$scratch/proxy.log"
say "source:      criu-relay proxy is connected to it; commit point: restored, the default"

start process "$scratch/migrant" "$scratch/app" --heap "$mib"
process=$pid
disown "$process" # bash need not tell that it was killed
until_true 30 "the process that is to be moved" test -e "$scratch/app/ready"
ask
before=$counter
say "source:      process $process runs, with $mib MiB of random memory; its counter is at $before"

say "source:      criu dump --stream freezes it and hands its memory over ..."
start dump "$criu" dump --stream -D "$scratch/source" -t "$process" \
    --action-script "$relay" -v4 -o dump.log
exit_status "$pid" "criu dump"
dumped=$status
[[ $dumped == 0 ]] || fail "criu dump: exit $dumped"
until_ended "$process" "the original"
grep -q 'the copy stands ready' "$scratch/proxy.log" || fail "the proxy says nothing of a copy that stands ready"
say "source:      criu dump: exit 0; the original is gone, since its copy stands ready on the other side"

# --- the destination again

exit_status "$proxy" "the proxy"
from_proxy=$status
exit_status "$cache" "the cache"
from_cache=$status
grep -q 'confirmed and released' "$scratch/proxy.log" || fail "the proxy says nothing of a confirmation"
[[ $from_proxy == 0 && $from_cache == 0 ]] || fail "the proxy: exit $from_proxy, the cache: exit $from_cache"
grep -q 'the copy runs' "$scratch/cache.log" || fail "the cache says nothing of a copy that runs"
freeze=$(grep -o '[^] ][^]]* prepared beforehand.*' "$scratch/proxy.log") || fail "the proxy does not say where the time went"
say "destination: the copy runs; criu lazy-pages has filled in its memory, and has ended"
say "the freeze: $freeze"
standstill=${freeze##*released after }
ask
((counter > before)) || fail "the counter went from $before to $counter"
! has_ended "$restore" || fail "criu restore has ended"
files=$(find "$scratch" "$view" -name '*.img')
[[ -z $files ]] || fail "images are left: $files"
say "destination: process $process has checked its memory; its counter is at $counter; no image was ever on a disk"

say "migrated: process $process ($mib MiB) went on from counter $before on the other side, memory verified;" \
    "proxy exit $from_proxy, cache exit $from_cache; it stood still for $standstill"
