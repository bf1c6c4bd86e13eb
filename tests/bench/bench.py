#!/usr/bin/env python3
"""Measures criu-relay against what it is compared with. Started by run.sh, which builds what it needs."""

import argparse
import ctypes
import mmap
import os
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
GIB = 1 << 30
HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = 120  # seconds; for failures only


class Skip(Exception):
    """A figure can't be had here, and why."""


class Failed(Exception):
    """Something that the bench needs went wrong."""


def say(text=""):
    print(text, flush=True)


# ---- processes ----


class Process:
    """A child of ours. It speaks in lines; it is killed when its run ends."""

    def __init__(self, run, name, command, *, pass_fds=(), env=None, stdin=subprocess.PIPE, **more):
        self.name = name
        self.run = run
        run.started.append(self)
        self.log = os.path.join(run.dir, f"{len(run.started)}-{name}.log")
        with open(self.log, "wb") as log:
            more.setdefault("stdout", subprocess.PIPE)
            self.popen = subprocess.Popen(
                [str(word) for word in command], stdin=stdin, stderr=log, pass_fds=pass_fds, env=env, bufsize=0, **more
            )
        self.pid = self.popen.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.heard = b""

    def fail(self, what):
        with open(self.log, errors="replace") as log:
            tail = log.read()[-2000:]
        raise Failed(f"{self.name}: {what}\n{tail}")

    def line(self):
        """The next one; None at the end."""
        while b"\n" not in self.heard:
            if not readable(self.popen.stdout.fileno(), PATIENCE):
                self.fail("says nothing")
            more = os.read(self.popen.stdout.fileno(), 4096)
            if not more:
                return None
            self.heard += more
        line, self.heard = self.heard.split(b"\n", 1)
        return line.decode()

    def until(self, word):
        """All that it says up to the line that begins with this word: {word: number}."""
        said = {}
        while word not in said:
            line = self.line()
            if line is None:
                self.end(None)
                self.fail(f"has ended before its '{word}'")
            key, _, value = line.partition(" ")
            said[key] = float(value or 0)
        return said

    def tell(self):
        try:
            os.write(self.popen.stdin.fileno(), b"\n")
        except BrokenPipeError:
            pass  # it has ended: what is awaited next says so

    def go_on(self, word):
        self.tell()
        return self.until(word)

    def end(self, wanted=0, within=PATIENCE):
        """Waits for its end; 'wanted' is the status, None any."""
        if not readable(self.pidfd, within):
            self.fail("does not end")
        status = self.popen.wait()
        if wanted is not None and status != wanted:
            self.fail(f"has ended with {status}")
        return status

    def kill(self):
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        for end in (self.popen.stdin, self.popen.stdout):
            if end:
                end.close()
        os.close(self.pidfd)

    # what it has used

    def cpu(self):
        """CPU seconds of all its threads."""
        total = 0
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            with open(f"/proc/{self.pid}/task/{thread}/schedstat") as stat:
                total += int(stat.read().split()[0])
        return total / 1e9

    def memory(self, field):
        with open(f"/proc/{self.pid}/status") as status:
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
        raise Failed(f"{self.name} has no {field}")

    def files(self):
        """Bytes of the memory files that it has open."""
        found = {}
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            path = f"/proc/{self.pid}/fd/{fd}"
            try:
                if os.readlink(path).startswith("/memfd:"):
                    stat = os.stat(path)
                    found[stat.st_ino] = stat.st_blocks * 512
            except FileNotFoundError:
                pass  # Closed since it was listed.
        return sum(found.values())


def readable(fd, seconds):
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Run:
    """One measurement: its directory, and what it has started."""

    def __init__(self, bench, *, tmpfs=False):
        self.bench = bench
        self.tmpfs = tmpfs
        self.started = []
        self.mounted = []

    def __enter__(self):
        self.dir = tempfile.mkdtemp(prefix="criu-relay-bench-", dir="/dev/shm" if self.tmpfs else None)
        for name in ("source", "target"):
            os.mkdir(os.path.join(self.dir, name), 0o700)
        self.source = os.path.join(self.dir, "source")
        self.target = os.path.join(self.dir, "target")
        return self

    def __exit__(self, *_):
        for process in reversed(self.started):
            process.kill()
        reap_orphans()
        for path in self.mounted:
            subprocess.run(["umount", path], check=False, timeout=PATIENCE)
        shutil.rmtree(self.dir, ignore_errors=True)

    def mount(self, path):
        """A tmpfs of its own there, with large pages if they can be had."""
        os.mkdir(path, 0o700)
        command = ["mount", "-t", "tmpfs", "-o", "mode=700,size=90%,huge=always", "none", path]
        if subprocess.run(command, stderr=subprocess.DEVNULL, check=False, timeout=PATIENCE).returncode == 0:
            self.mounted.append(path)

    def helper(self, name, *args):
        return Process(self, name, [os.path.join(self.bench.helpers, name), *args])

    def daemon(self, role, *args):
        """One of ours, which is ready. For the cache, with its port."""
        begin, end = os.pipe()
        with os.fdopen(begin) as ready:
            where = self.source if role == "proxy" else self.target
            command = [self.bench.relay, role, "-D", where, "--address", "127.0.0.1", "--status-fd", end, *args]
            try:
                process = Process(self, role, command, pass_fds=(end,), stdin=subprocess.DEVNULL)
            finally:
                os.close(end)
            if not readable(begin, PATIENCE) or ready.read(1) != "\0":
                process.end(None, within=1)
                process.fail("can't start")
        if role == "cache":
            process.port = int(process.line().rpartition(":")[2])
        return process

    def pair(self, *proxy_args, cache_args=()):
        cache = self.daemon("cache", "--port", 0, "--keep", *cache_args)
        proxy = self.daemon("proxy", "--port", cache.port, "--keep", *proxy_args)
        return proxy, cache

    def warm(self, size):
        """Sees to it that so much of the machine's free memory is really there."""
        if self.bench.cold:
            return
        subprocess.run([os.path.join(self.bench.helpers, "bare"), "warm", str(size)], check=True, timeout=PATIENCE)


def reap_orphans():
    """Those whose parents are gone become our children; all of them have been killed."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def available():
    with open("/proc/meminfo") as info:
        for line in info:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def need_memory(size):
    if available() < size:
        raise Skip(f"it needs {size / GIB:.1f} GiB of free memory, and there are {available() / GIB:.1f}")


# ---- figures ----


class Bench:
    def __init__(self, options):
        self.relay = options.relay
        self.helpers = options.helpers
        self.quick = options.quick
        self.size = options.mib * MIB if options.mib else (512 * MIB if self.quick else 2 * GIB)
        self.rounds = options.rounds or (3 if self.quick else 5)
        self.heap = 512 if self.quick else 1024
        self.cold = self.asked_cold = options.cold
        self.verbose = options.verbose
        self.rows = []
        help_text = subprocess.run([self.relay, "--help"], capture_output=True, text=True, timeout=10).stdout
        self.has = {name: f"--{name}" in help_text for name in ("splice", "retain", "commit", "prepare")}
        # An action that nobody acts on ends with 0 where the program is an action script.
        env = {**os.environ, "CRTOOLS_SCRIPT_ACTION": "post-resume"}
        probe = subprocess.run([self.relay], env=env, capture_output=True, timeout=10)
        self.scripted = probe.returncode == 0 and not options.unscripted
        self.script = [self.relay] if self.scripted else []
        self.stored = ["--commit", "stored"] if self.scripted and self.has["commit"] else []
        self.note = "" if self.scripted else ", unscripted"

    def show(self, values, unit=""):
        return f"{statistics.median(values):.3g}{unit}"

    def row(self, name, ours, other, target, verdict, how):
        """One line of the table, at once."""
        self.rows.append((name, verdict))
        mark = {True: "met", False: "missed", None: "-"}[verdict]
        say(f"{name:<58} {ours:>13} {other:>13} {how:>9}  {target:<22} {mark}")

    def ratio(self, name, ours, other, unit, *, most=None, least=None):
        """Two lists, measured in turn."""
        ratio = statistics.median(ours) / statistics.median(other)
        target = f"at most {most}" if most is not None else f"at least {least}"
        verdict = ratio <= most if most is not None else ratio >= least
        self.row(name, self.show(ours, unit), self.show(other, unit), target, verdict, f"{ratio:.2f}")
        self.rounds_of(ours, other)

    def difference(self, name, ours, other):
        """Two lists of seconds, measured in turn. Nothing is promised of it."""
        difference = (statistics.median(ours) - statistics.median(other)) * 1000
        self.row(name, self.show(ours, " s"), self.show(other, " s"), "", None, f"{difference:+.1f} ms")
        self.rounds_of(ours, other)

    def rounds_of(self, ours, other):
        if self.verbose:
            say("    ours:  " + " ".join(f"{value:.3g}" for value in ours))
            say("    other: " + " ".join(f"{value:.3g}" for value in other))

    def figure(self, name, value, target, verdict):
        self.row(name, value, "", target, verdict, "")

    def skip(self, name, why):
        say(f"{name}: skipped: {why}")

    def stored_size(self, size):
        """How much memory an image of this size may take in all."""
        return int(size * (1.25 if self.scripted else 2.25)) + 256 * MIB  # unscripted: at the proxy too

    # -- one measurement each

    def stream(self, size, proxy_args=(), script=None, serve=True):
        """A dump and a restore of one big image. What each leg has used, in all."""
        script = self.script if script is None else script
        gb = size / 1e9
        with Run(self) as run:
            proxy, cache = run.pair(*proxy_args, *(self.stored if script else []))
            dump = run.helper("fakecriu", "dump", run.source, size, *script)
            restore = run.helper("fakecriu", "restore", run.target, size, *script)
            dump.until("ready")
            restore.until("ready")
            run.warm(self.stored_size(size))
            restore.go_on("connected")
            proxy_before, cache_before = proxy.cpu(), cache.cpu()
            dumped = dump.go_on("closed")
            retained = proxy.files()
            dumped.update(dump.until("end"))
            served = restore.until("inventory")
            dumped_cpu, stored_cpu = proxy.cpu(), cache.cpu()
            stored = dumped["kill"] if script else served["inventory"]
            result = {
                "rate": gb / (stored - dumped["begin"]),
                "proxy": (dumped_cpu - proxy_before) / gb,
                "receiving": (stored_cpu - cache_before) / gb,
                "proxy peak": proxy.memory("VmHWM") + max(retained, proxy.files()),
                "cache memory": cache.memory("RssAnon") + cache.files() - size,
            }
            if script:
                # From the script's end, without the time that killing takes.
                result["release"] = served["inventory"] - dumped["kill"] - (dumped["dead"] - dumped["kill"])
            if serve:
                serving_before = cache.cpu()
                restore.go_on("done")
                result["serving"] = (cache.cpu() - serving_before) / gb
                restore.go_on("end")
        return result

    def bare_pipeline(self, size, *copy):
        gb = size / 1e9
        with Run(self) as run:
            bare = run.helper("bare", "pipeline", size, *copy)
            bare.until("ready")
            run.warm(self.stored_size(size))
            said = bare.go_on("done")
            bare.end()
        seconds = said["end"] - said["begin"]
        return {"rate": gb / seconds, "source": said["source"] / gb, "sink": said["sink"] / gb}

    def bare_serve(self, size):
        with Run(self) as run:
            bare = run.helper("bare", "serve", size)
            bare.until("ready")
            said = bare.go_on("done")
            bare.end()
        return said["serve"] / (size / 1e9)

    def remote(self, make_pair, count, size, *, together):
        """Seconds from the first byte written to the last one read; the reader comes first, or afterwards."""
        with Run(self) as run:
            make_pair(run)
            dump = run.helper("fakecriu", "remote-dump", run.source, count, size)
            restore = run.helper("fakecriu", "remote-restore", run.target, 0, count, size)
            dump.until("ready")
            restore.until("ready")
            run.warm(int(count * (size + 8192) * 2.5) + 256 * MIB)
            if together:
                restore.go_on("waiting")
                begin = dump.go_on("begin")["begin"]
            else:
                begin = dump.go_on("written")["begin"]
                restore.tell()
            end = restore.until("done")["done"]
        return end - begin

    def our_pair(self, run):
        run.pair()

    def replica_pair(self, run):
        cache = run.helper("replica", "cache", run.target)
        port = int(cache.until("ready")["ready"])
        run.helper("replica", "proxy", run.source, port).until("ready")

    # -- the groups of figures

    def group_stream(self):
        """stream dialect: throughput; CPU of the proxy, of the cache receiving and serving"""
        need_memory(self.stored_size(self.size) + GIB)
        args = []
        ours, pipeline, serve = [], [], []
        for _ in range(self.rounds):
            ours.append(self.stream(self.size, args))
            pipeline.append(self.bare_pipeline(self.size))
            serve.append(self.bare_serve(self.size))

        def of(runs, key):
            return [run[key] for run in runs]

        self.ratio(
            f"stream{self.note}, dump to stored / bare pipeline", of(ours, "rate"), of(pipeline, "rate"), " GB/s", least=0.9
        )
        self.ratio(
            f"proxy{self.note or ', spliced'} / bare source leg", of(ours, "proxy"), of(pipeline, "source"), " s/GB", most=1.15
        )
        self.ratio("cache, receiving / bare sink leg", of(ours, "receiving"), of(pipeline, "sink"), " s/GB", most=1.15)
        self.ratio("cache, serving / bare splice to a pipe", of(ours, "serving"), serve, " s/GB", most=1.15)

    def group_copy(self):
        """CPU of the proxy that retains nothing and copies"""
        args = ["--retain", "none"] if self.has["retain"] else []
        need_memory(self.stored_size(self.size) + GIB)
        ours, bare = [], []
        for _ in range(self.rounds):
            ours.append(self.stream(self.size, args, script=[], serve=False)["proxy"])
            bare.append(self.bare_pipeline(self.size, "copy")["source"])
        name = "proxy --retain none, unscripted" if args else "proxy, unscripted (it has no --retain)"
        self.ratio(f"{name} / bare read+write", ours, bare, " s/GB", most=1.15)

    def group_remote(self):
        """remote dialect: throughput"""
        need_memory(self.size * 2.5 + GIB)
        gb = self.size / 1e9
        ours, replica = [], []
        for _ in range(self.rounds):
            ours.append(gb / self.remote(self.our_pair, 1, self.size, together=True))
            replica.append(gb / self.remote(self.replica_pair, 1, self.size, together=True))
        self.ratio("remote, UNIX socket to UNIX socket / 4 KiB replica", ours, replica, " GB/s", least=4)

    def group_images(self):
        """remote dialect: 10,000 images of 1 KiB"""
        count = 10_000
        ours, replica = [], []
        for _ in range(self.rounds):
            ours.append(count / self.remote(self.our_pair, count, 1024, together=False))
            replica.append(count / self.remote(self.replica_pair, count, 1024, together=False))
        self.ratio("remote, 10,000 images of 1 KiB / a thread for each", ours, replica, " /s", least=2)

    def group_memory(self):
        """memory of the proxy and of the cache for one large image"""
        size = GIB if self.quick else 4 * GIB
        need_memory(self.stored_size(size) + GIB)
        run = self.stream(size, serve=False)
        peak = run["proxy peak"] / MIB
        self.figure(f"proxy{self.note}, {size // GIB} GiB image, peak", f"{peak:.1f} MiB", "at most 8 MiB", peak <= 8)
        beyond, most = run["cache memory"], 0.005 * size + 8 * MIB
        self.figure(
            f"cache, {size // GIB} GiB image, beyond it", f"{beyond / MIB:.1f} MiB", f"at most {most / MIB:.1f} MiB", beyond <= most
        )

    def group_small(self):
        """memory of the cache for 100,000 images of 1 KiB"""
        count, size = (10_000 if self.quick else 100_000), 1024
        with Run(self) as run:
            _, cache = run.pair()
            idle = cache.memory("RssAnon") + cache.files()
            dump = run.helper("fakecriu", "remote-dump", run.source, count, size)
            last = run.helper("fakecriu", "remote-restore", run.target, count - 1, 1, size)
            dump.until("ready")
            last.until("ready")
            dump.go_on("written")
            last.go_on("done")
            full = cache.memory("RssAnon") + cache.files()
        each = (full - idle) / count - size
        self.figure(f"cache, {count:,} images of 1 KiB, beyond each", f"{each:.0f} bytes", "at most 600 bytes", each <= 600)

    def group_release(self):
        """from the end of `post-dump` to the first answer to the restore"""
        name = "post-dump's end to the restore's first answer"
        if not self.scripted:
            return self.skip(name, "this program is no action script")
        rounds = [self.stream(64 * MIB, serve=False)["release"] * 1000 for _ in range(self.rounds * 2 + 1)]
        value = statistics.median(rounds)
        self.figure(name, f"{value:.1f} ms", "at most 20 ms", value <= 20)

    def group_standstill(self):
        """a real process: ours in every way, criu page-server, tar"""
        criu = Criu(self)
        need_memory(self.heap * MIB * 5 + GIB)
        # What is promised here holds for fresh memory: nobody but ours touches any beforehand.
        self.cold = True
        # On one machine, whoever restores when the source is dead gets the memory that it has left. So do the others;
        # with commit restored, the default, nobody does, which matters to all but the lazy restore.
        ways = {
            "unprepared, --stream": (self.stored, {"prepare": "off"}, 1.0),
            "prepared, --stream": (self.stored, {}, 0.65),
            "prepared, view": (self.stored, {"view": "plain"}, 0.5),
            "prepared, view, lazy": ((), {"view": "lazy"}, 0.2),
            "lazy, commit stored": (self.stored, {"view": "lazy"}, None),
        }
        ours, server, tar = {way: [] for way in ways}, [], []
        for _ in range(self.rounds):
            for way, (args, how, _) in ways.items():
                ours[way].append(criu.relay(self.heap, *args, **how)["standstill"])
            server.append(criu.page_server(self.heap))
            tar.append(criu.tar(self.heap))
        for way, (_, _, most) in ways.items():
            if most is not None:
                self.ratio(f"standstill, {self.heap} MiB, {way} / criu page-server", ours[way], server, " s", most=most)
        lazily = [ours["prepared, view, lazy"], ours["lazy, commit stored"]]
        self.difference(f"standstill, {self.heap} MiB, lazy, commit restored - stored", *lazily)
        way = "unprepared, --stream"
        self.ratio(f"standstill, {self.heap} MiB, {way} / tar over TCP", ours[way], tar, " s", most=0.5)

    def group_lazy(self):
        """a real process, lazily: from the dump's confirmation to the first tick, 4 GiB against 1 GiB"""
        criu = Criu(self)
        large, small = [], []
        need_memory(4 * self.heap * MIB * 4 + GIB)
        for _ in range(self.rounds):
            large.append(criu.relay(4 * self.heap, view="lazy")["to run"])
            small.append(criu.relay(self.heap, view="lazy")["to run"])
        self.ratio(f"lazy, confirmed to running, {4 * self.heap} MiB / {self.heap} MiB", large, small, " s", most=1.5)

    def group_tiny(self):
        """a real process of 8 KiB: ours, and dump and restore on tmpfs with no network at all"""
        criu = Criu(self)
        ours, files = [], []
        for _ in range(self.rounds * 4 + 1):
            ours.append(criu.relay(0)["standstill"])
            files.append(criu.files(0))
        self.ratio("standstill, 8 KiB / dump and restore on tmpfs", ours, files, " s", most=1.5)

    def group_commit(self):
        """a real process: what commit `restored` adds to the standstill of `stored`"""
        if not self.stored:
            return self.skip("commit restored - stored", "this program has no commit points")
        criu = Criu(self)
        need_memory(self.heap * MIB * 4 + GIB)
        # With `stored` the copy gets the pages that the dead source has left, with `restored` others. Between two
        # hosts neither does: so all of them have been touched.
        self.cold = self.asked_cold
        # What it takes does not grow with the process; it shows where little else takes time.
        for heap in (16, self.heap):
            restored, stored = [], []
            for _ in range(self.rounds * 2 + 1):
                restored.append(criu.relay(heap, "--commit", "restored")["standstill"])
                stored.append(criu.relay(heap, *self.stored)["standstill"])
            self.difference(f"standstill, {heap} MiB, commit restored - stored", restored, stored)

    def group_6gib(self):
        """a real process of 6 GiB: peak memory of the daemons"""
        criu = Criu(self)
        mib = 6 * 1024
        need_memory(mib * MIB * 3 + 2 * GIB)  # the source, the images, the copy
        run = criu.relay(mib)
        proxy, cache, files = (run[key] / MIB for key in ("proxy peak", "cache peak", "cache files"))
        say(
            f"6 GiB process{self.note}: standstill {run['standstill']:.2f} s; peak memory: proxy {proxy:.1f} MiB, "
            f"cache {cache:.1f} MiB beside {files:.0f} MiB of images"
        )


# ---- the real CRIU ----


class Criu:
    def __init__(self, bench):
        self.bench = bench
        if os.geteuid() != 0:
            raise Skip("CRIU needs root")
        if not os.path.ismount("/dev/shm"):
            raise Skip("there is no tmpfs at /dev/shm")
        top = os.path.dirname(os.path.dirname(HERE))
        fetch = subprocess.run([os.path.join(top, "tests/fetch-criu.sh")], capture_output=True, text=True, timeout=600)
        if fetch.returncode == 77:
            raise Skip(fetch.stderr.strip())
        if fetch.returncode:
            raise Failed(f"tests/fetch-criu.sh: {fetch.stderr}")
        self.path = os.path.join(top, "target/criu/criu")

    def ticker(self, run, mib):
        """The process, running, and its page."""
        path = os.path.join(run.dir, "page")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(fd, 4096)
        page = mmap.mmap(fd, 4096)
        os.close(fd)
        null = subprocess.DEVNULL
        with open(os.devnull, "wb") as log:
            command = [os.path.join(self.bench.helpers, "ticker"), path, mib]
            process = Process(run, "ticker", command, stdin=null, stdout=null, start_new_session=True)
        process.page = page
        self.wait("the process that is to be moved", lambda: self.looks(process) > 50)
        return process

    @staticmethod
    def looks(process):
        return struct.unpack_from("Q", process.page)[0]

    @staticmethod
    def standstill(process):
        return struct.unpack_from("Q", process.page, 8)[0] / 1e9

    @staticmethod
    def wait(what, event):
        """For what tells nobody that it happens."""
        deadline = time.monotonic() + PATIENCE
        while not event():
            if time.monotonic() > deadline:
                raise Failed(f"waited in vain for {what}")
            time.sleep(0.005)

    def criu(self, run, verb, where, *args):
        command = [self.path, verb, "-D", where, "-v1", "-o", f"{verb}.log", *args]
        if verb == "restore":
            command = ["unshare", "-pf", "--mount-proc", "--kill-child", *command]
        return Process(run, f"criu-{verb}", command, stdin=subprocess.DEVNULL)

    def done(self, process, where, verb):
        if process.end(None) != 0:
            path = os.path.join(where, f"{verb}.log")
            with open(path, errors="replace") as log:
                process.fail(f"criu {verb} has failed: {log.read()[-1500:]}")

    def dump(self, run, ticker, where, *args):
        dump = self.criu(run, "dump", where, "-t", ticker.pid, *args)
        self.done(dump, where, "dump")
        ticker.end(-signal.SIGKILL)

    def until_it_runs(self, restore, ticker):
        before = self.looks(ticker)  # the original is dead

        def event():
            if restore.popen.poll() is not None:
                self.done(restore, restore.where, "restore")
            return self.looks(ticker) > before + 10

        self.wait("the copy", event)
        return self.standstill(ticker)

    def restore(self, run, *args):
        restore = self.criu(run, "restore", run.target, *args)
        restore.where = run.target
        return restore

    def relay(self, mib, *proxy_args, view=None, prepare=None):
        """Through our daemons. 'view': None, a --stream restore; "plain" or "lazy", one from a directory."""
        script = ["--action-script", self.bench.relay] if self.bench.scripted else []
        with Run(self.bench, tmpfs=True) as run:
            args = ["--prepare", prepare] if prepare and self.bench.has["prepare"] else []
            images = os.path.join(run.dir, "view")
            if view:
                run.mount(images)
            # So that the restore may see another /proc: the PIDs of the source are taken here.
            cache_args = ["--view", images, "--persist"] if view else []
            proxy, cache = run.pair(*args, *proxy_args, cache_args=[*args, *cache_args])
            ticker = self.ticker(run, mib)
            if view:
                restore = self.restore_from(run, images, view == "lazy", *script)
                self.wait("somebody who waits for the images", lambda: self.is_connected(images, "relay-cache.sock"))
            else:
                restore = self.restore(run, "--stream", *script)

                def waits():
                    if restore.popen.poll() is not None:
                        self.done(restore, run.target, "restore")
                    return self.is_connected(run.target, "streamer-serve.sock")

                self.wait("a restore that is connected", waits)
            run.warm(int(mib * MIB * 2.25))
            self.dump(run, ticker, run.source, "--stream", *script)
            retained, stored = proxy.files(), cache.files()
            standstill = self.until_it_runs(restore, ticker)
            times = self.times(cache)
            return {
                "standstill": standstill,
                "to run": max(times["ready"], times["released"]) - times["stored"] if times else None,
                "proxy peak": proxy.memory("VmHWM") + retained,
                "cache peak": cache.memory("VmHWM"),
                "cache files": max(stored, cache.files()),
            }

    def times(self, cache):
        """What its line about the freeze says, in seconds."""
        pattern = r"stored after (\d+) ms.* ready after (\d+) ms.* released after (\d+) ms|stored after (\d+) ms.* released after (\d+) ms.* ready after (\d+) ms"
        found = []

        def told():
            with open(cache.log, errors="replace") as log:
                found[:] = re.findall(pattern, log.read())
            return found

        if not self.bench.scripted:
            return None
        self.wait("the line that says where the time went", told)
        stored, ready, released, stored2, released2, ready2 = found[-1]
        seconds = {"stored": stored or stored2, "ready": ready or ready2, "released": released or released2}
        return {what: int(ms) / 1000 for what, ms in seconds.items()}

    @staticmethod
    def is_connected(where, name):
        """Whether somebody is connected to this socket."""
        sock = os.path.join(where, name)
        with open("/proc/net/unix") as table:
            lines = [line.split() for line in table]
        return any(line[5] == "03" and line[7:] == [sock] for line in lines)

    def restore_from(self, run, images, lazily, *script):
        """As soon as the dump is complete, out of its directory."""
        where = f'-D "{images}" -W "{run.target}"'
        lines = [f'"{self.bench.relay}" wait -D "{images}" >/dev/null']
        if lazily:
            lines.append(f'"{self.path}" lazy-pages {where} -v1 -o lazy.log --daemon')
        more = " ".join(f'"{word}"' for word in script)
        lines.append(f'exec "{self.path}" restore {where} -v1 -o restore.log {"--lazy-pages" if lazily else ""} {more}')
        command = ["unshare", "-pf", "--mount-proc", "--kill-child", "sh", "-c", " && ".join(lines)]
        restore = Process(run, "criu-restore", command, stdin=subprocess.DEVNULL)
        restore.where = run.target
        return restore

    def files(self, mib):
        """Out of files on tmpfs, on this host."""
        with Run(self.bench, tmpfs=True) as run:
            ticker = self.ticker(run, mib)
            run.warm(int(mib * MIB * 2.25))
            self.dump(run, ticker, run.target)
            return self.until_it_runs(self.restore(run), ticker)

    def page_server(self, mib):
        """The pages over TCP into tmpfs, the other images by hand."""
        with Run(self.bench, tmpfs=True) as run:
            ticker = self.ticker(run, mib)
            port = free_port()
            begin, end = os.pipe()
            command = [self.path, "page-server", "-D", run.target, "--address", "127.0.0.1", "--port", port, "-v1"]
            command += ["-o", "page-server.log", "--status-fd", end]
            server = Process(run, "criu-page-server", command, stdin=subprocess.DEVNULL, pass_fds=(end,))
            os.close(end)
            with os.fdopen(begin) as ready:
                if not readable(begin, PATIENCE) or ready.read(1) != "\0":
                    self.done(server, run.target, "page-server")
            run.warm(int(mib * MIB * 2.25))
            self.dump(run, ticker, run.source, "--page-server", "--address", "127.0.0.1", "--port", port)
            for name in os.listdir(run.source):
                if name.endswith(".img"):
                    shutil.copy(os.path.join(run.source, name), run.target)
            self.done(server, run.target, "page-server")
            return self.until_it_runs(self.restore(run), ticker)

    def tar(self, mib):
        """Images on tmpfs, sent with tar."""
        with Run(self.bench, tmpfs=True) as run:
            ticker = self.ticker(run, mib)
            run.warm(int(mib * MIB * 3.25))
            self.dump(run, ticker, run.source)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                out = socket.create_connection(listener.getsockname())
                into, _ = listener.accept()
            with out, into:
                receiver = Process(run, "tar", ["tar", "-C", run.target, "-xf", "-"], stdin=into)
                sender = Process(run, "tar", ["tar", "-C", run.source, "-cf", "-", "."], stdin=subprocess.DEVNULL, stdout=out)
            sender.end()
            receiver.end()
            return self.until_it_runs(self.restore(run), ticker)


def free_port():
    """A port that the kernel gives to nobody by itself."""
    first = 10_000 + os.getpid() % 1000 * 20
    for port in range(first, first + 20):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise Failed("not one port of twenty is free")


def main():
    groups = {name[6:]: getattr(Bench, name) for name in vars(Bench) if name.startswith("group_")}
    parser = argparse.ArgumentParser(
        prog="tests/bench/run.sh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures criu-relay against what it is compared with.",
        epilog="figures:\n" + "\n".join(f"  {name:<11} {group.__doc__}" for name, group in groups.items()),
    )
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help="only these (default: all)")
    parser.add_argument("--quick", action="store_true", help="512 MiB instead of 2 GiB, and fewer rounds")
    parser.add_argument("--mib", type=int, help="the size of the large image")
    parser.add_argument("--rounds", type=int, help="how often each is measured")
    parser.add_argument("--unscripted", action="store_true", help="without action scripts even where there are")
    parser.add_argument("--cold", action="store_true", help="don't touch free memory before each measurement")
    parser.add_argument("-v", "--verbose", action="store_true", help="every round's values too")
    parser.add_argument("--relay", help=argparse.SUPPRESS)
    parser.add_argument("--helpers", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for figure in options.figures:
        if figure not in groups:
            parser.error(f"there is no figure '{figure}'")

    # What is started here ends here; nobody else waits for orphans on some machines.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))

    bench = Bench(options)
    say(
        f"{bench.size // MIB} MiB, medians of {bench.rounds} rounds in turn, {os.cpu_count()} processors, "
        f"Linux {os.uname().release}; {'scripted' if bench.scripted else 'unscripted'}"
    )
    say(f"{'':<58} {'ours':>13} {'other':>13} {'ratio':>9}  {'target':<22}")
    failed = False
    for name, group in groups.items():
        if options.figures and name not in options.figures:
            continue
        try:
            group(bench)
        except Skip as why:
            bench.skip(name, why)
        except Failed as why:
            failed = True
            say(f"{name}: could not be measured: {why}")
    missed = [name for name, verdict in bench.rows if verdict is False]
    promised = [name for name, verdict in bench.rows if verdict is not None]
    say(f"{len(promised)} figures with a target, {len(promised) - len(missed)} met" + "".join(f"\n  missed: {name}" for name in missed))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
