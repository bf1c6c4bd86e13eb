"""Runs with `--view DIR --persist` (--view): the restore reads a directory, the cache may be killed at every step, and an
operator starts again what has gone, by what can be known: logs, exit statuses, who runs, and which files there are."""

import os
import shlex
import shutil
import signal
import tempfile
import time

import outcome
import procs

STEPS_CACHE = ("step-cache", "step-rolled-back", "step-restore-fails")
KILLS_CACHE = ("kill-cache", "kill-both") + STEPS_CACHE

# How long the cache stays dead: from before CRIU has noticed until everything has failed.
DEAD_FOR = [0, 0, 0.01, 0.05, 0.2, 0.6, 1.5, 3.5]

# With this many steps of the cache, counted from the first record, a session is over.
STEPS = 42

# How long CRIU does not notice.
SLOW = 2.5

# A restore that fails again and again is an outcome.
ATTEMPTS = 8

RESTORE = """{relay} wait -D {view} || exit 7
"""

LAZY_PAGES = """({criu} lazy-pages -D {view} -W {work} -v4 -o lazy-pages.log &)
n=0
until [ -S {work}/lazy-pages.socket ]; do
    n=$((n + 1)); [ $n -lt 1000 ] || exit 8
    sleep 0.005
done
"""


class View:
    """A part of `migration.Run`; `self.view` is None in runs without one."""

    def prepare_view(self, with_view):
        self.view, self.steps, self.died = None, [], 0
        self.lazy = self.direct = self.is_direct = self.restarts = self.is_starting = False
        if not with_view:
            return
        self.view = tempfile.mkdtemp(prefix="relay-harness-", dir="/dev/shm")
        self.restarts = self.fault in KILLS_CACHE
        # Whether the pages are filled in when the copy runs already.
        self.lazy = self.rng.random() < 0.35
        # Whether nobody starts the cache again, if the images are there: they are restored as they are.
        self.direct = self.restarts and self.commit == "stored" and self.rng.random() < 0.25
        self.dead_for = self.rng.choice(DEAD_FOR)
        if self.fault in STEPS_CACHE:
            self.steps = [self.rng.randrange(1, STEPS + 1)]
            # And once more, when it has been started again.
            if self.rng.random() < 0.4 and not self.direct:
                self.steps.append(self.rng.randrange(1, STEPS // 2))
        # Whether CRIU has no time to notice.
        self.slow = self.restarts and self.rng.random() < 0.15
        self.note(f"view {self.view}, lazy {self.lazy}, direct {self.direct}, dead for {self.dead_for} s, steps {self.steps}, slow {self.slow}")

    def view_args(self):
        return ["--view", self.view, "--persist"] if self.view else []

    def finish_view(self):
        if self.view:
            self.note(f"in the view at the end: {' '.join(sorted(os.listdir(self.view)))}")
            shutil.rmtree(self.view)

    # --- the restore

    def view_restore(self, number, scripts):
        """The command of a restore from the view: a shell, and CRIU when there is something to restore."""
        work = self.path(f"restore-{number}")
        os.mkdir(work, 0o700)
        words = {"relay": self.paths.relay, "criu": self.paths.criu, "view": self.view, "work": work}
        words = {name: shlex.quote(word) for name, word in words.items()}
        criu = [self.paths.criu, "restore", "-D", self.view, "-W", work, "-v4", "-o", "restore.log"]
        criu += [] if self.is_direct else scripts
        text = "" if self.is_direct else RESTORE.format(**words)
        if self.lazy:
            text += LAZY_PAGES.format(**words)
            criu.append("--lazy-pages")
        return ["sh", "-c", f"{text}exec {shlex.join(criu)}"]

    def lazy_daemons(self):
        below = [pid for first, *_ in self.hosts for pid in procs.below(first)]
        return [pid for pid in below if "lazy-pages" in procs.text(f"/proc/{pid}/cmdline").split("\0") and procs.lives(pid)]

    def wait_for_pages(self):
        """All memory has come."""
        if self.lazy and self.hosts:
            self.until(lambda: not self.lazy_daemons(), "end of criu lazy-pages", within=30)

    # --- the operator

    def look_after(self):
        """Starts again what has gone, when the cache was killed."""
        if not self.restarts or not self.cache or not self.dump or self.is_starting:
            return
        if self.cache.starts > self.died and self.family.ended.get(self.cache.pid) in (-signal.SIGKILL, 128 + signal.SIGKILL):
            self.died = self.cache.starts
            if self.died <= len(self.steps):
                now = self.now_in()
                self.note(f"the cache was killed before step {self.steps[self.died - 1]}, in the phase {now}")
                if self.died == 1:
                    self.hit = now
            if self.slow and self.died == 1 and procs.send(self.target("restore"), signal.SIGSTOP):
                restore = self.target("restore")
                self.later(SLOW, "the restore goes on", lambda: procs.send(restore, signal.SIGCONT))
            if not self.direct:
                self.later(self.dead_for, "the cache is started again", self.start_again)
        if self.cache.starts > 1:
            self.restart_restore()

    def step(self, starts):
        """Before which of its steps this run of the cache is killed."""
        return self.steps[starts - 1] if starts <= len(self.steps) else None

    def start_again(self):
        self.is_starting = True
        if self.cache.has_ended():
            self.start_cache()
        if self.fault == "kill-both" and self.proxy.has_ended():
            self.proxy.start()
        self.is_starting = False

    def restart_restore(self):
        """It has failed, and there is no copy."""
        if not self.hosts or not self.restore_ended() or self.cache.has_ended() or len(self.hosts) >= ATTEMPTS:
            return
        if self.copy_pids() or self.restore_status() == 0:
            return
        self.is_starting = True
        self.end_host()
        self.note(f"the restore is started again: it has ended with {self.restore_status()}")
        self.start_restore()
        self.is_starting = False

    def restore_status(self):
        """The exit status of the last restore."""
        last = self.hosts[-1][2].read().split("ended ")[-1].split()
        return os.waitstatus_to_exitcode(int(last[0])) if last else None

    # --- the end

    def in_view(self):
        """What could be restored from the view, now or when the source has spoken."""
        names = os.listdir(self.view) if self.view else []
        return [name for name in names if name == "inventory.img" or name.startswith(".inventory.img.")]

    def restore_directly(self):
        """The cache is dead, and stays so."""
        if not self.direct or not self.died or self.board.running() or self.tree_lives() or self.copy_pids():
            return False
        if "inventory.img" not in self.in_view() or self.hosts and not self.restore_ended():
            return False
        self.direct, self.is_direct = False, True
        self.restarts = False
        self.end_host()
        self.note("the view is restored as it is")
        self.start_restore()
        self.until(lambda: (self.board.running() or {}) != {} or self.restore_ended(), "copy", within=10, must=False)
        self.rest()
        return True

    def end_host(self):
        # What the last restore has left lies in the way.
        if self.hosts:
            procs.send(self.hosts[-1][0], 9)
            pid = self.hosts[-1][3]
            deadline = time.monotonic() + outcome.PATIENCE
            while pid not in self.family.ended:
                if time.monotonic() > deadline:
                    raise outcome.Broken("the destination's processes do not end")
                self.family.reap()
                time.sleep(0.001)
