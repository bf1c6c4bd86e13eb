"""What has become of a migration: when it has come to rest, where it runs, and what an operator does if it is open."""

import os
import signal
import time

import board
import procs
import scenario

PATIENCE = 20


class Broken(Exception):
    """The harness itself has failed: no outcome."""


class Outcome:
    """A part of `migration.Run`."""

    def dump_over(self):
        return self.dump in self.family.ended

    def tree_lives(self):
        """The tree on the source: not dead, and not about to be."""
        return [pid for pid in self.tree_pids() if procs.lives(pid)]

    def tree_pids(self):
        return [pid for pid in procs.below(os.getpid()) if procs.comm(pid) == "ticker" and not self.in_a_host(pid)]

    def in_a_host(self, pid):
        return any(pid in procs.below(first) for first, *_ in self.hosts)

    def copy_pids(self):
        """What there is of copies, stopped or not."""
        below = [pid for first, *_ in self.hosts for pid in procs.below(first)]
        return [pid for pid in below if procs.comm(pid) == "ticker" and procs.lives(pid)]

    def state(self):
        """What changes as long as something happens."""
        logs = [len(log.read()) for daemon in (self.proxy, self.cache) for log in daemon.logs]
        criu = [procs.state(pid) for pid in [self.dump] + [criu for _, criu, *_ in self.hosts]]
        ends = [self.proxy.has_ended(), self.cache.has_ended(), len(self.family.ended)]
        return logs, ends, [letter in "XZ" for letter in criu], self.board.running(), len(self.copy_pids())

    def rest(self):
        """Waits until nothing more is going to happen."""
        since, last = time.monotonic(), None
        deadline = since + PATIENCE
        while time.monotonic() < deadline:
            self.look()
            now = self.state()
            if now != last:
                last, since = now, time.monotonic()
            if not self.to_undo and now[3] is not None and time.monotonic() - since >= self.quiet(now[3]):
                return
            time.sleep(0.005)
        self.note("it never came to rest")

    def quiet(self, running):
        """For how long nothing must have changed."""
        proxy, cache = self.proxy.has_ended(), self.cache.has_ended()
        whole = list(running.values()) == [board.ACTORS]
        restore = self.restore_ended() or not self.hosts
        if self.dump_over() and whole and proxy and (cache and (restore or 0 not in running)):
            return 0.1
        # A proxy that has had no dump waits for one.
        if self.dump_over() and running == {0: board.ACTORS} and not self.proxy.said("a dump begins"):
            return 0.6
        # Nobody is there who could do anything more, except that CRIU restores.
        if self.dump_over() and (proxy or cache):
            if whole and (proxy or not 0 in running):
                return 0.3
            if proxy and cache:
                return 0.6
            if proxy and self.cache_waits() or cache and not self.tree_lives():
                return 0.6
        # The timeouts of the daemons.
        return scenario.CONFIRM_TIMEOUT + 0.8

    def cache_waits(self):
        """Its images have not been released, or no restore is there that could ask for them."""
        return not self.cache.said("released by its source") or self.restore_ended()

    def outcome(self):
        """Where it runs, and how well."""
        # A busy machine gets more time.
        running = self.until(lambda: self.board.running(), "", within=0.2, must=False) or {}
        if running:
            # A tick that was begun on the source may be counted there by the copy, once.
            self.until(lambda: list((self.board.running() or {}).values()) == [board.ACTORS], "", within=1, must=False)
            running = self.board.running() or running
        overlaps, moments = self.board.overlaps(), ""
        for one, other, took in overlaps:
            if took is None or not self.may_run_for_moments(one, took):
                return "doubled", f"on the hosts {one} and {other}" + (f", there for {took:.1f} ms" if took else "")
            moments = f"the copy ran for {took:.1f} ms"
        if len(running) > 1:
            return "doubled", f"on the hosts {sorted(running)}"
        if not running:
            return self.held()
        host, actors = running.popitem()
        where = "source" if host == 0 else "destination"
        if host != 0:
            self.wait_for_pages()
        if actors < board.ACTORS:
            self.note_tasks()
            if host != 0 and self.cache.has_ended() and self.stopped_copies() and not self.tree_lives():
                return "held", "the cache was killed when it had continued a part of the copy"
            return "halved", f"{actors} of {board.ACTORS} run on the {where}"
        self.board.ask()
        answers = self.until(lambda: len(self.board.answers(host)) == board.ACTORS and self.board.answers(host), "",
                             within=5, must=False)
        if not answers or not all(answers):
            return "damaged", f"on the {where}: {answers}"
        return (f"{where} (moments)" if moments else where), moments

    def note_tasks(self):
        """What the kernel knows of every task of the tree, wherever it is."""
        wanted = ("State", "TracerPid", "SigPnd", "ShdPnd", "SigBlk", "SigIgn")
        for pid in self.tree_pids() + self.copy_pids():
            for task in procs.tasks(pid):
                lines = procs.text(f"/proc/{pid}/task/{task}/status").splitlines()
                said = [" ".join(line.split()) for line in lines if line.startswith(wanted)]
                where = [procs.text(f"/proc/{pid}/task/{task}/{name}").strip() for name in ("wchan", "syscall")]
                self.note(f"task {task} of {pid}: {', '.join(said + where)}")

    def may_run_for_moments(self, host, took):
        """The one case of this kind that the manual admits: at pre-resume CRIU does not ask whether its script has
        died, and lets the copy run, before anything of it has been stopped. The source is frozen meanwhile."""
        about = self.fault in ("kill-restore-script", "kill-restore")
        return host == 0 and about and self.commit == "restored" and self.hit in ("made", "restoring") and took < 100

    def held(self):
        """Nothing runs. Is there anything from which it can?"""
        tree = self.tree_lives()
        if tree:
            return "held", "the source: " + " ".join(f"{pid} is {procs.state(pid)}" for pid in tree)
        if self.has_images():
            return "held", "the cache has its images"
        if self.in_view():
            return "held", f"the view has the images: {self.in_view()}"
        copy = self.copy_pids()
        if copy and all(procs.state(pid) in "Tt" for pid in copy):
            return "held", "a copy is stopped"
        if self.has_let_go() and self.fault in ("kill-cache", "kill-both") and self.commit == "stored" and not self.view:
            return "lost (admitted)", ""
        return "lost", ""

    def has_images(self):
        text = self.cache.text()
        has_stored = "the dump is stored" in text or "the dump is complete" in text
        return not self.cache.has_ended() and has_stored and "rolled back" not in text

    def has_let_go(self):
        return self.proxy.said("CRIU goes on")

    # --- in doubt

    def stopped_copies(self):
        """Copies that stand stopped. What a CRIU that was killed has left half-way is none."""
        return [pid for pid in self.copy_pids() if procs.state(pid) in "Tt"]

    def is_open(self, outcome):
        """Whether nothing runs, or a program waits for a word, or a copy that nobody wants stands there."""
        if outcome.startswith("source"):
            return self.has_images() or bool(self.stopped_copies()) or bool(self.in_view())
        # Nobody else is to make another copy; of one that was made without its script the cache has not heard.
        if outcome.startswith("destination") and not self.is_direct and self.fault != "no-restore-script":
            return bool(self.in_view())
        return outcome == "held"

    def resolve(self, way):
        """What an operator does; the name of it, or None: nothing can be done."""
        tree, done = self.tree_lives(), []
        self.direct = False
        # Nothing holds it any more: CRIU is dead, and it has been stopped by whoever has killed that.
        for pid in tree:
            if procs.state(pid) == "T" and self.dump_over():
                procs.send(pid, signal.SIGCONT)
                done = ["SIGCONT"]
        if self.paths.knows_resolve:
            done.append(way)
            if way == "restart":
                self.start_daemons()
            else:
                self.operator("rollback" if tree else "commit")
            self.rest()
            # A cache that was killed once more meanwhile was not heard.
            if way == "restart" and self.died > 1 and self.proxy.has_ended():
                self.start_daemons()
                self.rest()
        if not self.board.running() and not self.tree_lives() and self.can_restore_again():
            self.restore_again()
            done.append("restore")
        return "+".join(done)

    def start_daemons(self):
        if self.cache.has_ended():
            self.start_cache()
        if self.proxy.has_ended():
            self.proxy.start()

    def can_restore_again(self):
        """The images are there and wait for a restore, and none is there."""
        released = self.cache.said("served now") or self.fault == "no-source-script" or self.paths.knows_resolve
        return released and not self.cache.has_ended() and (not self.hosts or self.restore_ended()) and not self.stopped_copies()

    def operator(self, verdict):
        for verb in ("proxy", "cache"):
            argv = [self.paths.relay, "resolve", verdict, "-W", self.path(verb)]
            pid = self.family.start(argv, f"resolve-{verb}.out")
            self.until(lambda: pid in self.family.ended, f"end of {' '.join(argv)}")
            self.note(f"resolve {verdict} in {verb}: exit {self.family.ended[pid]}")

    def restore_again(self):
        self.end_host()
        self.note("the restore is started again")
        self.start_restore()
        self.until(lambda: (self.board.running() or {}) != {} or self.restore_ended(), "copy", within=10, must=False)
        self.rest()
