/*
 * A host of the fault harness: PID, mount and UTS namespaces of its own, in which a command runs.
 *
 *     host NAME PIDS COMMAND [ARGUMENT]...
 *
 * Its first process does nothing but reap, so that what the command leaves behind when it is killed stays, as it
 * would on a real host. PIDS gets two lines: the process id of the first process and of the command, as seen from
 * outside; and later, when the command has ended, its status as wait(2) has it. Whoever kills this program, or its
 * child, ends the host with all that runs there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static void die(const char *what)
{
	perror(what);
	_exit(111);
}

/* The process id that the world outside gives to this process: `proc` is the /proc from there. */
static int outer_pid(int proc)
{
	char text[32];
	ssize_t n = readlinkat(proc, "self", text, sizeof text - 1);

	if (n < 0)
		die("/proc/self");
	text[n] = 0;
	return atoi(text);
}

int main(int argc, char **argv)
{
	int proc, fd, status;
	pid_t init, command, ended;

	if (argc < 4)
		return 2;
	fd = open(argv[2], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 || proc < 0)
		die(argv[2]);
	if (unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWUTS) != 0)
		die("unshare");
	if (sethostname(argv[1], strlen(argv[1])) != 0)
		die("sethostname");
	init = fork();
	if (init < 0)
		die("fork");
	if (init > 0) {
		while (waitpid(init, &status, 0) < 0 && errno == EINTR)
			;
		return 0;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 || mount("proc", "/proc", "proc", 0, NULL) != 0)
		die("mount");
	command = fork();
	if (command < 0)
		die("fork");
	if (command == 0) {
		dprintf(fd, "%d\n", outer_pid(proc));
		execvp(argv[3], argv + 3);
		die(argv[3]);
	}
	dprintf(fd, "%d\n", -outer_pid(proc));
	for (;;) {
		ended = wait(&status);
		if (ended == command)
			dprintf(fd, "ended %d\n", status);
		else if (ended < 0)
			/* Nothing is left; and a real host stays, too. */
			pause();
	}
}
