"""What can happen to a migration, and when: the phases of a session, the faults, and which meet which."""

import random

# A phase begins when one of the daemons has logged these words.
PHASES = {
    "stored": [
        ("idle", None, None),
        ("dumping", "proxy", "a dump begins"),
        ("held", "proxy", "CRIU is held until"),
        ("confirmed", "proxy", "the cache has confirmed everything: CRIU goes on"),
        ("restoring", "cache", "released by its source"),
        ("after", "cache", "the restore has succeeded"),
    ],
    "restored": [
        ("idle", None, None),
        ("dumping", "proxy", "a dump begins"),
        ("held", "proxy", "CRIU is held until"),
        ("restoring", "cache", "the dump is stored"),
        ("made", "cache", "the copy has been restored"),
        ("prepared", "cache", "the copy stands ready"),
        ("confirmed", "proxy", "the copy stands ready: CRIU goes on"),
        ("after", "cache", "the copy runs"),
    ],
}

# With --view there is a CRIU on the destination only when there is something to restore.
VIEW_PHASES = {
    "stored": PHASES["stored"][:4] + [
        ("published", "cache", "released by its source"),
        ("restoring", "cache", "a restore has announced itself"),
        ("made", "cache", "the copy has been restored"),
        ("after", "cache", "the restore has succeeded"),
    ],
    "restored": PHASES["restored"][:3] + [
        ("published", "cache", "the dump is stored"),
        ("restoring", "cache", "a restore has announced itself"),
    ] + PHASES["restored"][4:],
}

# About how long each lasts, in seconds, and how often something goes over the link meanwhile.
LENGTH = {
    "idle": 0.1, "dumping": 0.05, "held": 0.003, "confirmed": 0.005, "published": 0.06, "restoring": 0.08,
    "made": 0.01,
    "prepared": 0.003, "after": 0.1,
}

WAYS = {"held": 2, "confirmed": 1, "prepared": 1}

# Who can be killed, and stopped for a second, and for longer than anybody waits.
WHO = ["dump", "proxy", "cache", "restore", "source-script", "restore-script"]
HOW = ["kill", "stop", "hang"]
LINK = ["link-reset", "link-hole", "link-dead", "link-refuse", "link-delay"]
MOVING = [f"{how}-{who}" for who in WHO for how in HOW] + LINK + ["kill-both"]

# Those that stand from the beginning.
STATIC = [
    "none", "script-fails-post-dump", "script-fails-post-restore", "leave-running", "no-source-script",
    "no-restore-script", "lost-stored", "lost-release", "lost-released", "lost-rolled-back",
]
STATIC_RESTORED = STATIC + ["lost-ready"]

# SIGSTOP and a link that is gone last so long; the long ones longer than --confirm-timeout.
SHORT, LONG = 1.0, 4.5
CONNECT_TIMEOUT, CONFIRM_TIMEOUT, RESTORE_TIMEOUT = 2, 3, 3


def phases(commit, view):
    return (VIEW_PHASES if view else PHASES)[commit]


def faults(commit, view):
    names = MOVING + (STATIC_RESTORED if commit == "restored" else STATIC)
    if view:
        # What a view is for. Without a script, its copy runs at once, as the manual says.
        names = names + ["step-cache"] * 3 + ["step-rolled-back", "step-restore-fails"] + ["kill-cache"] * 5
        names = [name for name in names if name != "no-restore-script" or commit == "stored"]
    return names


def phases_of(fault, commit, view=False):
    """When a fault can come."""
    names = [name for name, _, _ in phases(commit, view)]
    if fault.startswith("step-"):
        return ["steps"]
    if fault not in MOVING:
        return ["-"]
    who = fault.partition("-")[2]
    if who == "dump":
        # It has ended soon after it was let go.
        return names[1:names.index("confirmed") + 1]
    if who == "source-script":
        return [name for name in names[:names.index("confirmed")] if name != "dumping"]
    if who == "restore-script":
        # A view's restore is a CRIU only when it has begun.
        return [name for name in names if name in ("published" if view else "idle", "restoring", "made")]
    if who == "restore" and view:
        return names[names.index("published"):]
    if who == "proxy" or who == "both":
        # It ends when it has been answered.
        return names[:-1]
    if who == "cache" and commit == "stored":
        return names[:-1]
    return names


def plan(commit, runs, seed, fault=None, phase=None, view=False):
    """So many runs: (seed, fault, phase). A run is made of these three and nothing else."""
    moving, static = {}, []
    for name in faults(commit, view):
        for when in phases_of(name, commit, view):
            if fault in (None, name) and phase in (None, when):
                (static if when == "-" else moving.setdefault(when, [])).append(name)
    if not moving and not static:
        raise SystemExit(f"there is no fault {fault or '(any)'} in a phase {phase or '(any)'} with {commit}: see README.md")
    rng = random.Random(seed)

    def rounds(names):
        while True:
            names = names[:]
            rng.shuffle(names)
            # The long ones are much like the short ones, and long.
            yield from (name for name in names if fault or not is_long(name) or rng.random() < 0.34)

    # Every phase as often as every other, whatever can happen in it; and in one run of ten none.
    order = rounds(list(moving)) if moving else None
    within = {when: rounds(names) for when, names in moving.items()}
    static = rounds(static) if static else None
    out = []
    while len(out) < runs:
        if static and (not order or len(out) % 10 == 9):
            out.append((seed + len(out), next(static), "-"))
        else:
            when = next(order)
            out.append((seed + len(out), next(within[when]), when))
    return out


def is_long(fault):
    return fault.startswith("hang-") or fault == "link-dead"
