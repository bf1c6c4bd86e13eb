#!/bin/bash
# Makes a real CRIU that runs here: the executable target/criu/criu. Beside it is target/criu/crit, the tool
# that shows images; where that can't be had, it says so and exits 77.
#
# Debian 12's criu does not start on recent kernels and Debian 13 has none, so unless the machine
# has a working one (3.19 or newer) this takes Debian unstable's with all its libraries, its own
# C library and loader included, and unpacks them into target/criu/root. Nothing is installed: apt
# works with its own lists and cache in target/criu/apt, from the mirror the machine already uses.
#
# Idempotent, quiet on success. Exits 77 ("skipped") with one sentence where it cannot be done.
set -euo pipefail
umask 022

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=$top/target/criu
criu=$dir/criu
crit=$dir/crit
apt=$dir/apt
root=$dir/root

skip() {
    echo "fetch-criu: $1" >&2
    exit 77
}

# new_enough PROGRAM: it starts and is 3.19 (the first with the pre-stream action) or newer.
new_enough() {
    local version
    version=$("$1" --version 2>/dev/null | sed -n 's/^Version: *//p') || return 1
    [[ -n $version ]] && printf '3.19\n%s\n' "$version" | sort --version-sort --check=quiet
}

# One at a time; the lock goes with us.
mkdir -p "$dir"
exec 9>"$dir/lock"
flock 9

if [[ -x $criu && -x $crit ]] && new_enough "$criu"; then
    exit 0
fi

[[ $(id -u) == 0 ]] || skip "CRIU needs root, and this is user $(id -u)."

rm -rf "$root" "$apt" "$criu" "$crit"

# install_wrapper PROGRAM: makes the wrapper on standard input that program, all at once.
install_wrapper() {
    cat >"$1.new"
    chmod 755 "$1.new"
    mv "$1.new" "$1"
}

# no_crit WHY: the rest does not depend on it.
no_crit() {
    printf '#!/bin/sh\necho "crit: %s" >&2\nexit 77\n' "$1" | install_wrapper "$crit"
}

# prove: the last word, whichever criu it is. Sets $why when it fails.
prove() {
    if ! new_enough "$criu"; then
        why="it does not start, or is older than 3.19: $("$criu" --version 2>&1 | tail -n 1 || true)"
    elif ! "$criu" check >"$dir/check.log" 2>&1; then
        why="'criu check' says: $(tail -n 1 "$dir/check.log")"
    else
        return 0
    fi
    rm -f "$criu"
    return 1
}

if system=$(type -P criu) && new_enough "$system"; then
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$system" | install_wrapper "$criu"
    if prove; then
        if system=$(type -P crit); then
            printf '#!/bin/sh\nexec "%s" "$@"\n' "$system" | install_wrapper "$crit"
        else
            no_crit "none is installed beside criu."
        fi
        exit 0
    fi
fi

for tool in apt-get apt-cache dpkg dpkg-deb; do
    type -P "$tool" >/dev/null || skip "no criu that works is installed, and there is no $tool to get one with."
done

# sources: the machine's own Debian sources with the suite 'unstable', main only, as one-line
# entries. Security and third-party archives have no such suite and are left out: a source counts
# when it has a suite named like this release itself, or one of the permanent names.
sources() {
    local codename
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-stable}")
    shopt -s nullglob
    local one_line=(/etc/apt/sources.list /etc/apt/sources.list.d/*.list)
    local stanzas=(/etc/apt/sources.list.d/*.sources)
    local file
    {
        for file in "${one_line[@]}"; do
            [[ -r $file ]] || continue
            # deb [options] URI suite component...
            sed -nE 's/^[[:space:]]*deb[[:space:]]+(\[[^]]*\][[:space:]]+)?([^[:space:]]+)[[:space:]]+([^[:space:]]+)[[:space:]]+main\b.*/\3|\1|\2/p' "$file"
        done
        for file in "${stanzas[@]}"; do
            # One record a stanza; comment lines may stand anywhere in it.
            grep -v '^#' "$file" | awk -v RS= -F '\n' '
                {
                    split("", f)
                    key = ""
                    for (i = 1; i <= NF; i++) {
                        if (match($i, /^[A-Za-z-]+:/)) {
                            key = tolower(substr($i, 1, RLENGTH - 1))
                            f[key] = substr($i, RLENGTH + 1)
                        } else {
                            f[key] = f[key] " " $i
                        }
                    }
                    # A key given in the stanza itself, not as a file, cannot go on one line.
                    key = f["signed-by"]
                    gsub(/^ +| +$/, "", key)
                    options = key ~ /^\/[^ ]*$/ ? "[signed-by=" key "] " : ""
                    if (f["types"] !~ /(^| )deb( |$)/ || f["components"] !~ /(^| )main( |$)/) next
                    if (tolower(f["enabled"]) ~ /no|false/) next
                    uris = split(f["uris"], uri, " ")
                    suites = split(f["suites"], suite, " ")
                    for (u = 1; u <= uris; u++)
                        for (s = 1; s <= suites; s++)
                            print suite[s] "|" options "|" uri[u]
                }'
        done
    } | awk -F '|' -v codename="$codename" '
        $1 == codename || $1 ~ /^(oldstable|stable|testing|unstable|sid)$/ {
            line = "deb " $2 $3 " unstable main"
            if (!seen[line]++) print line
        }'
}

mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/parts" "$root"
sources >"$apt/sources.list"
[[ -s $apt/sources.list ]] || skip "no Debian source is configured here to take criu's from."

# Read after the machine's own configuration (a proxy may stand there). With no package recorded as
# installed, everything that criu needs counts as missing; hooks would act on the machine's own apt.
: >"$apt/status"
cat >"$apt/conf" <<CONF
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "$apt/parts";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "$apt/parts";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "20";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
CONF
# run_apt COMMAND...: quiet.
run_apt() {
    local tool=$1
    shift
    "$tool" -c "$apt/conf" "$@" </dev/null >"$apt/log" 2>&1
}
# Its first complaint, without addresses.
complaint() {
    grep -m 1 -E '^[EW]:' "$apt/log" | sed -E 's#[a-z+]+://[^ ]*#(the mirror)#g' || tail -n 1 "$apt/log"
}

run_apt apt-get -q update ||
    skip "apt-get update for Debian unstable failed: $(complaint)"

# criu and every library that it needs, directly or not; the rest (python3, iptables, ...) are for
# other programs of the package.
mapfile -t packages < <(
    apt-cache -c "$apt/conf" depends --recurse --important criu 2>/dev/null |
        grep -E '^lib[^:]*$' | grep -vE '^lib(python|perl)' | sort -u
)
(( ${#packages[@]} > 0 )) || skip "Debian unstable has no criu for this machine's architecture."
(cd "$apt/cache/archives" && run_apt apt-get -q download criu "${packages[@]}") ||
    skip "downloading criu from Debian unstable failed: $(complaint)"
# All Python, and so is its protobuf, if it is told so: the machine's own Python can run it.
if ! type -P python3 >/dev/null; then
    why_no_crit="there is no python3 here."
elif ! (cd "$apt/cache/archives" && run_apt apt-get -q download python3-pycriu python3-protobuf); then
    why_no_crit="downloading it from Debian unstable failed: $(complaint)"
fi
for package in "$apt"/cache/archives/*.deb; do
    dpkg-deb --extract "$package" "$root"
done
rm -rf "$apt"

# The loader's place differs by architecture; its name is what criu asks for.
loader=$(find "$root" -name 'ld-linux*.so.*' -printf '%P\n' -quit)
binary=$(cd "$root" && ls usr/sbin/criu 2>/dev/null || echo sbin/criu)
libs=$(find "$root" -name '*.so*' -printf '%h\n' | grep -E '/lib(64)?(/[^/]*-linux-gnu)?$' | sort -u | sed "s#^$root/##")
[[ -n $loader && -f $root/$binary ]] || skip "the packages of Debian unstable do not hold what was expected."

# The program is started by its own loader with its own libraries, and by --library-path rather
# than the environment, so that what it starts itself (ip, tar, action scripts) is not touched.
# exec keeps the pid: signals and wait() work on criu itself.
{
    echo '#!/bin/sh'
    echo "root=\$(dirname \"\$(readlink -f \"\$0\")\")/root"
    echo "exec \"\$root/$loader\" --library-path \"$(sed 's#^#$root/#' <<<"$libs" | paste -sd :)\" \"\$root/$binary\" \"\$@\""
} | install_wrapper "$criu"
missing=$("$root/$loader" --library-path "$(sed "s#^#$root/#" <<<"$libs" | paste -sd :)" --list "$root/$binary" |
    awk '/not found/ { print $1 }' || true)
if [[ -n $missing ]]; then
    rm -f "$criu"
    skip "Debian unstable's criu needs libraries that were not found: ${missing//$'\n'/ }."
fi

prove || skip "Debian unstable's criu does not work on kernel $(uname -r): $why"

if [[ -n ${why_no_crit-} ]]; then
    no_crit "$why_no_crit"
else
    install_wrapper "$crit" <<'CRIT'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/root
export PYTHONPATH="$root/usr/lib/python3/dist-packages" PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python
exec python3 -B -m crit "$@"
CRIT
    "$crit" --help >/dev/null 2>&1 || no_crit "this python3 can't run Debian unstable's: $("$crit" --help 2>&1 | tail -n 1 || true)"
fi
