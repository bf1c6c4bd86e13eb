"""One run: a migration with one fault in it, up to the moment at which exactly one copy runs, or none."""

import collections
import os
import random
import signal
import subprocess
import time

import board
import link
import outcome
import procs
import scenario
import view

PATIENCE = outcome.PATIENCE
STEP = 0.001

Paths = collections.namedtuple("Paths", "relay criu tools knows_resolve commit more")


class Log:
    """What a file says so far."""

    def __init__(self, path):
        self.path, self.file, self.text = path, None, ""

    def read(self):
        if self.file is None:
            try:
                self.file = open(self.path, errors="replace")
            except OSError:
                return self.text
        self.text += self.file.read()
        return self.text


class Daemon:
    """A daemon in its work directory; it may be started more than once."""

    def __init__(self, run, verb, args):
        self.run, self.verb, self.args = run, verb, args
        self.starts, self.pid, self.logs = 0, None, []

    def start(self):
        self.starts += 1
        name = f"{self.verb}-{self.starts}"
        self.logs.append(Log(self.run.path(name + ".log")))
        argv = [self.run.paths.relay, self.verb, "-v2", "-D", self.run.path(self.verb), *self.args]
        step = self.run.step(self.starts) if self.verb == "cache" else None
        if step is not None:
            argv = [os.path.join(self.run.paths.tools, "steps"), str(step), "cache-", *argv]
        self.pid = self.run.family.start(argv, name + ".log", name + ".out")
        self.run.until(lambda: "is ready in" in self.text() or self.has_ended(), f"{name} that is ready")

    def text(self):
        return self.logs[-1].read() if self.logs else ""

    def said(self, words):
        return any(words in log.read() for log in self.logs)

    def has_ended(self):
        return self.pid in self.run.family.ended


class Run(outcome.Outcome, view.View):
    """The source is this process's own UTS namespace; each restore has a host of its own (host.c)."""

    def __init__(self, directory, paths, commit, seed, fault, phase, with_view):
        self.directory, self.paths, self.commit = directory, paths, commit
        self.phases = scenario.phases(commit, with_view)
        self.fault, self.phase, self.seed = fault, phase, seed
        self.rng = random.Random(f"{seed} {commit} {fault} {phase}")
        self.family = procs.Family(directory)
        self.board = None
        self.link = None
        self.dump = self.tree = None
        # (first process, CRIU, status file) of each restore, seen from here.
        self.hosts = []
        self.to_undo = []
        self.notes = []
        self.hit = "-"
        self.proxy = self.cache = None
        self.prepare_view(with_view)

    def path(self, name):
        return os.path.join(self.directory, name)

    def note(self, text):
        self.notes.append(f"{time.time():.3f} {text}")

    # --- time

    def look(self):
        """Takes in what has happened, and ends what a fault has begun when its time is up."""
        self.family.reap()
        self.board.look()
        if self.link.error:
            raise outcome.Broken(f"the middleman: {self.link.error!r}")
        now = time.monotonic()
        for item in [item for item in self.to_undo if item[0] <= now]:
            # What is undone may look, too.
            if item in self.to_undo:
                self.to_undo.remove(item)
                _, what, undo = item
                self.note(what)
                undo()
        self.look_after()

    def until(self, event, what, within=PATIENCE, must=True):
        deadline = time.monotonic() + within
        while True:
            self.look()
            got = event()
            if got:
                return got
            if time.monotonic() >= deadline:
                if must:
                    raise outcome.Broken(f"after {within} s there is still no {what}")
                return None
            time.sleep(STEP)

    # --- the beginning

    def script(self, name, action):
        """An action script that fails at this action."""
        path = self.path(name)
        with open(path, "w") as file:
            file.write(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != {action} ]\n')
        os.chmod(path, 0o700)
        return ["--action-script", path]

    def prepare(self):
        for verb in ("proxy", "cache"):
            os.mkdir(self.path(verb), 0o700)
        self.board = board.Board(self.path("board"))
        # What is as short as the way over the link is made a little longer.
        short = self.phase in ("held", "confirmed", "prepared")
        delay = self.rng.choice([0.004, 0.015, 0.03] if short else [0, 0.001, 0.004, 0.015])
        self.link = link.Link(delay)
        self.note(f"seed {self.seed}, {self.commit}, {self.fault} in {self.phase}; the link delays by {delay * 1000:.0f} ms")
        self.link.start()

        self.cache = Daemon(self, "cache", ["--port", "0", *self.view_args()])
        self.start_cache()
        timeouts = [*self.paths.more, "--connect-timeout", str(scenario.CONNECT_TIMEOUT), "--confirm-timeout", str(scenario.CONFIRM_TIMEOUT)]
        self.proxy = Daemon(self, "proxy", ["--port", str(self.link.port), "--commit", self.commit, *timeouts])
        self.proxy.start()
        # A process of a real host, with a few dozen others before it: its ids are free on the destination.
        self.tree = self.family.start([os.path.join(self.paths.tools, "ticker"), self.path("board"), "24", "8"], "tree.log")
        # Nothing says that a restore waits; with `stored` it need not.
        early = self.commit == "restored" or self.rng.random() < 0.7
        about_restore = self.fault.endswith("-restore") or self.fault.endswith("-restore-script")
        if (early or about_restore) and not (self.fault.endswith("-restore-script") and self.phase == "idle"):
            self.start_restore()
            waits = "the action script: wait" if self.view else "a restore has announced itself"
            self.until(lambda: self.cache.said(waits) or self.restore_ended()
                       or self.fault == "no-restore-script" and self.waits_unannounced(), "restore that waits")
        self.until(lambda: self.proxy.said("connected to"), "link")
        self.until(lambda: self.board.running() == {0: board.ACTORS}, "tree that runs")
        self.lose()

    def lose(self):
        """The confirmation that is going to be lost, if any."""
        words = self.fault.removeprefix("lost-") if self.fault.startswith("lost-") else None
        if words == "ready":
            self.link.cut_at = (link.WORDS["restore"], 2)
        elif words:
            self.link.cut_at = (link.WORDS[words], None)
        self.link.cut_for = self.rng.choice([0, 0.3, 1.5])

    def start_cache(self):
        self.cache.start()
        printed = Log(self.path(f"cache-{self.cache.starts}.out"))
        text = self.until(lambda: printed.read().endswith("\n") and printed.text or self.cache.has_ended() and " ",
                          "address of the cache").strip()
        if text:
            self.link.target = int(text.rpartition(":")[2])

    def start_restore(self):
        number = len(self.hosts) + 1
        status = self.path(f"restore-{number}.pids")
        args = ["--action-script", self.paths.relay]
        # The first only: what an operator starts later has none of these faults.
        if number == 1 and self.fault == "no-restore-script":
            args = []
        elif number == 1 and self.fault in ("script-fails-post-restore", "step-restore-fails"):
            args += self.script("fails-on-the-destination", "post-restore")
        if self.view:
            command = self.view_restore(number, args)
        else:
            command = [self.paths.criu, "restore", "--stream", "-D", self.path("cache"), "-v4", "-o", f"restore-{number}.log",
                       *args]
        argv = [os.path.join(self.paths.tools, "host"), f"destination-{number}", status, *command]
        pid = self.family.start(argv, f"restore-{number}.out")

        def pids():
            text = Log(status).read()
            numbers = [int(line) for line in text.splitlines() if not line.startswith("ended")] if text.endswith("\n") else []
            return len(numbers) == 2 and (-min(numbers), max(numbers)) or pid in self.family.ended and (None, None)

        first, criu = self.until(pids, "host of the restore")
        if first is None:
            raise outcome.Broken("the destination's namespaces can't be made")
        self.hosts.append((first, criu, Log(status), pid))

    def restore_ended(self):
        return bool(self.hosts) and "ended" in self.hosts[-1][2].read()

    def waits_unannounced(self):
        """CRIU is connected to the cache (03 in the kernel's table), which no line in any log says."""
        socket = self.path("cache/streamer-serve.sock")
        with open("/proc/net/unix") as file:
            lines = (line.split() for line in file)
            return any(line[-1] == socket and line[5] == "03" for line in lines)

    def start_dump(self):
        args = ["--action-script", self.paths.relay]
        if self.fault in ("script-fails-post-dump", "lost-rolled-back", "step-rolled-back"):
            # They run in reverse order, and this one is to run when ours has agreed.
            args = self.script("fails-on-the-source", "post-dump") + args
        elif self.fault == "leave-running":
            args += ["-R"]
        elif self.fault == "no-source-script":
            args = []
        self.dump = self.family.start([self.paths.criu, "dump", "--stream", "-D", self.path("proxy"), "-t", str(self.tree),
                                       "-v4", "-o", "dump.log", *args], "dump.out")

    # --- the fault

    def now_in(self):
        """The phase, by what the daemons have logged."""
        found = "idle"
        for name, verb, words in self.phases:
            if verb and getattr(self, verb).said(words):
                found = name
        return found

    def has_begun(self, phase):
        at = [name for name, _, _ in self.phases].index(phase)
        return any(verb is None or getattr(self, verb).said(words) for _, verb, words in self.phases[at:])

    def script_of(self, criu):
        # A shell that is going to be CRIU waits for the dump.
        if not criu or procs.comm(criu) == "sh":
            return None
        return next((pid for pid in procs.children(criu) if procs.comm(pid) == "criu-relay"), None)

    def target(self, who):
        criu = self.hosts[-1][1] if self.hosts else None
        return {
            "dump": lambda: self.dump,
            "proxy": lambda: self.proxy.pid,
            "cache": lambda: self.cache.pid,
            "restore": lambda: criu,
            "source-script": lambda: self.script_of(self.dump),
            "restore-script": lambda: self.script_of(criu),
        }[who]()

    def all_over(self):
        """Nothing can bring the phase that is waited for any more."""
        failed = self.family.ended.get(self.dump, 0) != 0
        # A proxy that has ended well has released it: the restore goes on.
        lost = self.family.ended.get(self.proxy.pid, 0) != 0
        return failed or self.dump_over() and (lost or self.cache.has_ended())

    def strike(self):
        """Waits for the phase, and a little more; then comes the fault."""
        how, _, who = self.fault.partition("-")
        idle = self.phase == "idle"
        if idle and self.fault != "kill-both" and not who.endswith("script"):
            # Before the dump begins, or while CRIU starts.
            self.wait(self.rng.uniform(0, scenario.LENGTH["idle"]))
            self.strike_now(how, who)
            return self.wait_and_dump()
        if who == "restore-script" and idle:
            self.start_restore()
            self.hunt(who)
            self.strike_now(how, who)
            return self.wait_and_dump()
        self.wait_and_dump()
        if not self.until(lambda: self.has_begun(self.phase) or self.all_over(), self.phase, must=False):
            self.note("the phase never came")
        if who.endswith("script"):
            self.hunt(who)
            self.wait(self.rng.choice([0, 0, self.rng.uniform(0, 0.004)]))
        else:
            self.wait(self.rng.uniform(0, scenario.LENGTH[self.phase] + scenario.WAYS.get(self.phase, 0) * self.link.delay))
        self.strike_now(how, who)

    def hunt(self, who):
        """A script lives for two milliseconds, unless it waits: here everything else waits."""
        deadline = time.monotonic() + 3
        while not self.target(who) and not self.all_over() and time.monotonic() < deadline:
            until = time.monotonic() + 0.01
            while not self.target(who) and time.monotonic() < until:
                pass
            self.look()

    def wait_and_dump(self):
        self.start_dump()
        if not self.hosts:
            # When the dump is under way, or is stored, or is over.
            if self.rng.random() < 0.5 or self.phase in ("restoring", "made", "after"):
                self.start_restore()

    def wait(self, seconds):
        until = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= until, "moment", within=seconds + 1)

    def later(self, seconds, what, undo):
        self.to_undo.append((time.monotonic() + seconds, what, undo))

    def strike_now(self, how, who):
        self.hit = self.now_in()
        if how == "link":
            return self.strike_link(who)
        numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "hang": signal.SIGSTOP}
        pids = [self.proxy.pid, self.cache.pid] if who == "both" else [self.target(who)]
        # In either order.
        self.rng.shuffle(pids)
        sent = [procs.send(pid, numbers[how]) for pid in pids]
        self.note(f"{self.fault} at {pids}: {sent}, in the phase {self.hit}")
        if not any(sent):
            self.hit = "missed"
        elif how != "kill":
            seconds = scenario.SHORT if how == "stop" else scenario.LONG
            self.later(seconds, f"{who} goes on", lambda: procs.send(pids[0], signal.SIGCONT))

    def strike_link(self, who):
        self.note(f"{self.fault} in the phase {self.hit}")
        normal = self.link.delay
        if who == "reset":
            self.link.reset()
        elif who == "refuse":
            self.link.set(mode="refuse")
            self.link.reset()
            self.later(self.rng.choice([0.3, 1.0, 3.0]), "the link is back", lambda: self.link.set(mode="open"))
        elif who == "delay":
            self.link.set(delay=0.5)
            self.later(1.5, "the link is fast again", lambda: self.link.set(delay=normal))
        else:
            self.link.set(mode="hole")
            seconds = scenario.LONG if who == "dead" else scenario.SHORT
            self.later(seconds, "the link is back", lambda: self.link.set(mode="open"))

    def go(self, way):
        """The whole run: (phase that was hit, first outcome, last outcome, details)."""
        begin = time.monotonic()
        procs.become_host("source")
        try:
            self.prepare()
            if self.fault in scenario.MOVING:
                self.strike()
            else:
                self.wait_and_dump()
            self.until(self.dump_over, "end of criu dump", must=False)
            if not self.hosts and self.family.ended.get(self.dump) == 0 and not self.cache.has_ended():
                self.start_restore()
            self.rest()
            how = "direct" if self.restore_directly() else ""
            first, why = self.outcome()
            self.note(f"{first} {why}")
            last = first
            if self.is_open(first):
                how = self.resolve(way)
                last, more = self.outcome()
                if self.paths.knows_resolve and self.is_open(last):
                    last += " (open)"
                self.note(f"then, by {how or 'nothing'}: {last} {more}")
            if self.link.cut_at or self.steps and not self.died:
                self.hit = "missed"
            return {"phase": self.hit, "took": time.monotonic() - begin, "first": first, "last": last, "why": why, "how": how}
        finally:
            self.finish()

    def finish(self):
        self.family.end()
        self.finish_view()
        if self.link:
            self.link.stop()
            if self.link.error:
                self.note(f"the middleman: {self.link.error!r}")
            self.notes += [f"{when:.3f} {'->' if to_cache else '<-'} {kind} {inner}" for when, to_cache, kind, inner in self.link.said]
        with open(self.path("notes.log"), "w") as file:
            file.write("".join(note + "\n" for note in sorted(self.notes)))


def paths(relay, criu, tools):
    """And what this criu-relay can do."""
    said = subprocess.run([relay, "--help"], capture_output=True, text=True, timeout=10, check=True).stdout
    more = ["--restore-timeout", str(scenario.RESTORE_TIMEOUT)] if "--restore-timeout" in said else []
    return Paths(relay, criu, tools, "resolve" in said, "restored" if "restored|" in said else "stored", more)
