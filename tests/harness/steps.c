/*
 * Kills a command at its Nth step: before the system call with which it would have done it.
 *
 *     steps N WORD COMMAND [ARGUMENT]...
 *
 * A step is what somebody else can see of it: a name that is made, changed or removed, a message, a signal. They are
 * counted from the first name that WORD is a part of. Exit status: that of the command, 137 when it was killed here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/ptrace.h>

static void die(const char *what)
{
	perror(what);
	_exit(111);
}

/* Which argument of a call is the name that it makes or removes; -1: it has none; -2: it is no step. */
static int name_of(unsigned long long nr)
{
	switch (nr) {
#ifdef SYS_rename
	case SYS_rename: return 1;
	case SYS_unlink: return 0;
	case SYS_symlink: return 1;
#endif
#ifdef SYS_renameat
	case SYS_renameat: return 3;
#endif
	case SYS_renameat2: return 3;
	case SYS_unlinkat: return 1;
	case SYS_symlinkat: return 2;
	case SYS_linkat: return 3;
	case SYS_sendto:
	case SYS_sendmsg:
	case SYS_pidfd_send_signal: return -1;
	default: return -2;
	}
}

static int has_word(pid_t pid, unsigned long long at, const char *word)
{
	char text[512] = "";
	struct iovec here = { text, sizeof text - 1 }, there = { (void *)(uintptr_t)at, sizeof text - 1 };

	/* It may lie at the end of what is mapped. */
	while (there.iov_len > 0 && process_vm_readv(pid, &here, 1, &there, 1, 0) < 0)
		here.iov_len = there.iov_len = there.iov_len / 2;
	return strstr(text, word) != NULL;
}

int main(int argc, char **argv)
{
	long n, step = 0;
	int status, name, counts = 0;
	pid_t pid;

	if (argc < 4)
		return 2;
	n = atol(argv[1]);
	pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (ptrace(PTRACE_TRACEME, 0, 0, 0) != 0)
			die("ptrace");
		raise(SIGSTOP);
		execv(argv[3], argv + 3);
		die(argv[3]);
	}
	if (waitpid(pid, &status, 0) != pid ||
	    ptrace(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL | PTRACE_O_TRACEEXEC) != 0)
		die("ptrace");
	for (int number = 0;;) {
		if (ptrace(PTRACE_SYSCALL, pid, 0, number) != 0 && errno != ESRCH)
			die("ptrace");
		if (waitpid(pid, &status, 0) != pid)
			die("waitpid");
		if (WIFEXITED(status))
			return WEXITSTATUS(status);
		if (WIFSIGNALED(status))
			return 128 + WTERMSIG(status);
		number = 0;
		if (WSTOPSIG(status) == (SIGTRAP | 0x80)) {
			struct __ptrace_syscall_info info;

			if (ptrace(PTRACE_GET_SYSCALL_INFO, pid, sizeof info, &info) <= 0 || info.op != PTRACE_SYSCALL_INFO_ENTRY)
				continue;
			name = name_of(info.entry.nr);
			if (name == -2)
				continue;
			if (!counts)
				counts = name >= 0 && has_word(pid, info.entry.args[name], argv[2]);
			if (!counts)
				continue;
			step++;
			/* For whoever reads the log of a run. */
			fprintf(stderr, "step %ld: system call %llu\n", step, (unsigned long long)info.entry.nr);
			if (step == n)
				kill(pid, SIGKILL);
		} else if (WSTOPSIG(status) != SIGTRAP) {
			number = WSTOPSIG(status);
		}
	}
}
