"""The fault harness: plans the runs, has some of them made at a time, and counts. See README.md."""

import argparse
import collections
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback

import migration
import procs
import scenario

BAD = ("lost", "doubled", "damaged", "halved", "broken")


def options():
    parser = argparse.ArgumentParser(prog="tests/harness/run.sh", allow_abbrev=False)
    parser.add_argument("--commit", choices=["stored", "restored"], default=None,
                        help="default: that of the proxy")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None, help="of the first run; each next one has the next")
    parser.add_argument("--fault", default=None)
    parser.add_argument("--phase", default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=None, help="start no run after so many")
    parser.add_argument("--resolve", choices=["restart", "resolve"], default=None, help="instead of both in turn")
    parser.add_argument("--view", action="store_true", help="with --view DIR --persist at the cache")
    parser.add_argument("--keep", action="store_true", help="keep the directories of all runs")
    for name in ("--relay", "--criu", "--tools"):
        parser.add_argument(name, required=True, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(paths, directory, commit, seed, fault, phase, view, way, out):
    """In a process of its own: one run."""
    # Python turns SIGINT into an exception; SIGTERM is to be another, so that the run cleans up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.setpgid(0, 0)
    procs.die_with_parent()
    sys.setswitchinterval(0.0005)
    try:
        result = migration.Run(directory, paths, commit, seed, fault, phase, view).go(way)
    except (Exception, KeyboardInterrupt) as error:
        with open(os.path.join(directory, "harness.log"), "w") as file:
            traceback.print_exc(file=file)
        result = {"phase": "-", "first": "broken", "last": "broken", "why": str(error), "how": ""}
    os.write(out, json.dumps(result).encode())


class Harness:
    def __init__(self, args):
        self.args = args
        self.paths = migration.paths(args.relay, args.criu, args.tools)
        args.commit = args.commit or self.paths.commit
        self.seed = args.seed if args.seed is not None else int(time.time()) % 1_000_000 * 1000
        self.base = tempfile.mkdtemp(prefix="relay-harness-")
        # pid: (number, seed, fault, phase, directory, pipe)
        self.running = {}
        self.counts = collections.Counter()
        self.resolved = collections.Counter()
        self.phases = collections.Counter()
        self.bad = []
        self.done = 0
        self.opened = 0

    def start(self, number, seed, fault, phase):
        directory = os.path.join(self.base, f"run-{number}")
        os.mkdir(directory, 0o700)
        back, out = os.pipe()
        # Of images that outlive their cache the next one decides.
        way = self.args.resolve or ("restart" if self.args.view else ("restart", "resolve")[number % 2])
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child(self.paths, directory, self.args.commit, seed, fault, phase, self.args.view, way, out)
                status = 0
            finally:
                os._exit(status)
        os.close(out)
        self.running[pid] = (number, seed, fault, phase, way, directory, back)

    def take(self, pid):
        number, seed, fault, phase, way, directory, back = self.running.pop(pid)
        text = b""
        while block := os.read(back, 4096):
            text += block
        os.close(back)
        result = json.loads(text) if text else {
            "phase": "-", "first": "broken", "last": "broken", "why": "it ended without a result", "how": ""}
        self.done += 1
        hit, first, last = result["phase"], result["first"], result["last"]
        came = first if first == last else f"{first} > {last}"
        self.counts[hit, fault, came] += 1
        self.phases[hit] += 1
        if result["how"]:
            self.resolved[result["how"], came] += 1
        # Whoever can resolve must.
        open_ = self.paths.knows_resolve and (last == "held" or last.endswith("(open)"))
        bad = first in BAD or last in BAD or open_
        print(f"{number:4} seed {seed} {fault:26} {phase:10} hit {hit:10} {came:24} {result.get('took', 0):4.1f} s {result['why']}"[:170].rstrip(), flush=True)
        if bad:
            view = " --view" if self.args.view else ""
            again = (f"tests/harness/run.sh --commit {self.args.commit}{view} --runs 1 --seed {seed} --fault {fault} --phase {phase} "
                     f"--resolve {way}")
            self.bad.append((came, directory, again))
            print(f"     {directory}\n     {again}", flush=True)
        elif not self.args.keep:
            shutil.rmtree(directory)

    def run(self):
        plan = scenario.plan(self.args.commit, self.args.runs, self.seed, self.args.fault, self.args.phase,
                             self.args.view)
        print(f"{len(plan)} runs with --commit {self.args.commit}{' --view' if self.args.view else ''}, seed {self.seed}, {self.args.jobs} at a time", flush=True)
        begin = time.monotonic()
        plan = list(enumerate(plan))
        try:
            while plan or self.running:
                late = self.args.seconds is not None and time.monotonic() - begin > self.args.seconds
                if late:
                    plan = []
                while plan and len(self.running) < self.args.jobs:
                    number, (seed, fault, phase) = plan.pop(0)
                    self.start(number, seed, fault, phase)
                if self.running:
                    pid, _ = os.wait()
                    self.take(pid)
        finally:
            for pid in self.running:
                os.kill(pid, signal.SIGTERM)
            for pid in self.running:
                os.waitpid(pid, 0)
        self.table(time.monotonic() - begin)

    def table(self, took):
        order = [name for name, _, _ in scenario.phases(self.args.commit, self.args.view)] + ["-", "missed"]
        print("\nphase x fault -> outcomes")
        rows = sorted({(hit, fault) for hit, fault, _ in self.counts},
                      key=lambda row: (order.index(row[0]), row[1]))
        for hit, fault in rows:
            outcomes = sorted((came, n) for (h, f, came), n in self.counts.items() if (h, f) == (hit, fault))
            print(f"  {hit:10} {fault:26} " + ", ".join(f"{came} {n}" for came, n in outcomes))
        print("\nruns in each phase: " + ", ".join(f"{name} {self.phases[name]}" for name in order if self.phases[name]))
        if self.resolved:
            print("resolved: " + ", ".join(f"{how}: {came} {n}" for (how, came), n in sorted(self.resolved.items())))
        total = collections.Counter()
        for (_, _, came), n in self.counts.items():
            for name in set(came.split(" > ")):
                total[name] += n
        finals = collections.Counter()
        for (_, _, came), n in self.counts.items():
            finals[came.split(" > ")[-1]] += n
        total["open"] = sum(n for word, n in finals.items() if word.endswith("(open)"))
        words = ["source", "source (moments)", "destination", "held", "lost (admitted)"]
        print("in the end: " + ", ".join(f"{finals[word]} {word}" for word in words if finals[word]))
        if total["open"]:
            print(f"not resolved: {total['open']}")
        print(f"{self.done} runs in {took:.0f} s: {total['lost']} lost, {total['doubled']} doubled, {total['damaged']} damaged, "
              f"{total['halved']} halved, {total['broken']} broken (no outcome)")
        for came, directory, again in self.bad:
            print(f"{came}: {directory}\n    {again}")
        if self.is_stuck():
            print("nothing has ever moved, so nothing was tried. CRIU says why: tests/harness/run.sh --runs 1 --fault none --keep")

    def is_stuck(self):
        """A source that can't be dumped here is never lost, and never runs twice. Two thirds of all runs move."""
        moved = any("destination" in came for _, _, came in self.counts)
        return not moved and self.done >= 10 and self.args.phase is None and self.args.fault in (None, "none")


def main():
    harness = Harness(options())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        harness.run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        harness.bad.append(None)
    finally:
        if not any(harness.bad) and not harness.args.keep:
            shutil.rmtree(harness.base, ignore_errors=True)
    sys.exit(1 if harness.bad or harness.is_stuck() else 0)


main()
