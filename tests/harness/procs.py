"""Processes: started, looked at through /proc, signalled, reaped, and none left behind."""

import ctypes
import os
import signal
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWUTS = 0x04000000

LIBC = ctypes.CDLL(None, use_errno=True)


def call(what, result):
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def become_host(name):
    """This process's UTS namespace becomes one of its own with this name; all orphans below come to it."""
    call("prctl", LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    call("unshare", LIBC.unshare(CLONE_NEWUTS))
    call("sethostname", LIBC.sethostname(name.encode(), len(name)))


def die_with_parent():
    """The kernel sends SIGTERM when the parent has gone."""
    call("prctl", LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0))


def text(path):
    """What a file of /proc says; nothing when the process has gone."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def tasks(pid):
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def children(pid):
    """The children of all threads of a process."""
    lists = (text(f"/proc/{pid}/task/{task}/children") for task in tasks(pid))
    return [int(child) for some in lists for child in some.split()]


def below(pid):
    """Everybody below a process."""
    todo, found = [pid], []
    while todo:
        for child in children(todo.pop()):
            found.append(child)
            todo.append(child)
    return found


def state(pid):
    """The letter of ps(1): R S D T t Z; X: it is gone."""
    return text(f"/proc/{pid}/stat").rpartition(") ")[2][:1] or "X"


def comm(pid):
    return text(f"/proc/{pid}/comm").strip()


def lives(pid):
    return state(pid) not in "ZX"


def send(pid, number):
    """Whether there was somebody to get it."""
    if pid is None or not lives(pid):
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class Family:
    """The children of this process. It alone waits for them."""

    def __init__(self, directory):
        self.directory = directory
        self.ended = {}

    def start(self, argv, log, stdout=None):
        """Starts a program that writes to this log; its process id."""
        def out(name):
            return os.open(os.path.join(self.directory, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        err = out(log)
        std = out(stdout) if stdout else os.dup(err)
        null = os.open("/dev/null", os.O_RDONLY)
        try:
            # CPython ignores SIGPIPE, and leaves that to its children.
            return os.posix_spawn(argv[0], argv, os.environ, file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, std, 1),
                (os.POSIX_SPAWN_DUP2, err, 2),
            ], setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM], setsigmask=[])
        finally:
            for fd in (err, std, null):
                os.close(fd)

    def reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.ended[pid] = os.waitstatus_to_exitcode(status)

    def end(self):
        """Kills all that are left, and those that they leave behind."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            # From above, so that nobody starts anything anew; the namespaces go with their first process.
            for pid in below(os.getpid()):
                send(pid, signal.SIGKILL)
            self.reap()
            if not children(os.getpid()):
                return
            time.sleep(0.002)
        raise RuntimeError(f"these do not die: {below(os.getpid())}")
