/*
 * Plays CRIU at the sockets in a directory, with memory of its own in place of a process's.
 *
 *     fakecriu dump DIR BYTES [RELAY]            criu dump --stream
 *     fakecriu restore DIR BYTES [RELAY]         criu restore --stream
 *     fakecriu remote-dump DIR N BYTES           criu dump --remote: N images of BYTES
 *     fakecriu remote-restore DIR FIRST N BYTES  criu restore --remote: N of these
 *
 * With RELAY, a program, it is run as an action script. Each says `ready`, and from then on one word and the
 * time (CLOCK_MONOTONIC) for each thing that happens. Where `<` stands below it waits for a line first.
 *
 *     dump             ready < [pre-stream] begin [pre-dump] images closed [post-dump kill dead] end
 *     restore          ready < connected inventory < served done < [post-restore pre-resume] end
 *     remote-dump      ready < begin written < end
 *     remote-restore   ready < waiting begin done < end
 */
#include "bench.h"

#include <sys/ptrace.h>

static const char *dir, *script;
static int dir_fd;

static void event(const char *what)
{
	say("%s %.9f", what, now());
}

static void go_on(void)
{
	if (!hear())
		exit(1); /* the driver is gone */
}

/* ---- what stands for the tree ---- */

/* A process that CRIU holds: under ptrace, stopped. */
static pid_t make_tree(void)
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	if (!pid) {
		die_with_parent();
		for (;;)
			pause();
	}
	return pid;
}

static void freeze(pid_t tree)
{
	int status;

	if (ptrace(PTRACE_SEIZE, tree, 0, 0) || ptrace(PTRACE_INTERRUPT, tree, 0, 0) ||
	    waitpid(tree, &status, __WALL) != tree || !WIFSTOPPED(status))
		die("freezing process %d", tree);
}

static void kill_tree(pid_t tree)
{
	int status;

	kill(tree, SIGKILL);
	while (waitpid(tree, &status, __WALL) == tree && WIFSTOPPED(status))
		;
}

/* ---- the action script, as CRIU runs it ---- */

static void run_script(const char *action, pid_t tree)
{
	char images[64], root[16] = "";
	int status;
	pid_t pid;

	if (!script)
		return;
	snprintf(images, sizeof(images), "/proc/%d/fd/%d", getpid(), dir_fd);
	if (tree)
		snprintf(root, sizeof(root), "%d", tree);
	event(action);
	pid = fork();
	if (pid < 0)
		die("fork");
	if (!pid) {
		setenv("CRTOOLS_SCRIPT_ACTION", action, 1);
		setenv("CRTOOLS_IMAGE_DIR", images, 1);
		setenv("CRTOOLS_INIT_PID", root, 1);
		close(0);
		dup2(2, 1);
		execl(script, script, (char *)NULL);
		die("%s", script);
	}
	if (waitpid(pid, &status, 0) != pid)
		die("waitpid");
	if (status) {
		fprintf(stderr, "the action script, for %s: status %#x\n", action, status);
		exit(1);
	}
}

/* ---- the stream dialect ---- */

static void request(int fd, const char *name)
{
	static struct frame frame;

	frame.length = 0;
	put_string(&frame, 1, name);
	send_frame(fd, &frame);
}

/* A pipe of which CRIU keeps end `ours`: 1 to write, 0 to read. */
static int hand_over(int fd, int ours)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = { .header = { .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
	struct iovec iov = { "", 1 };
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)
	};
	int ends[2];

	if (pipe2(ends, O_CLOEXEC))
		die("pipe2");
	control.header.cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(&control.header), &ends[!ours], sizeof(int));
	if (sendmsg(fd, &message, MSG_NOSIGNAL) != 1)
		die("handing over a pipe");
	close(ends[!ours]);
	return ends[ours];
}

static int open_image(int fd, const char *name)
{
	request(fd, name);
	return hand_over(fd, 1);
}

static void put_image(int fd, const char *name, size_t length)
{
	static char content[64 * KIB];
	int pipe = open_image(fd, name);

	write_all(pipe, content, length);
	close(pipe);
}

static void dump(uint64_t bytes)
{
	size_t length = bytes < POOL ? bytes : POOL;
	char *memory = make_memory(length);
	pid_t tree = make_tree();
	int fd, pagemap, pages;

	say("ready");
	go_on();
	run_script("pre-stream", 0);
	fd = connect_unix(dir, "streamer-capture.sock");
	run_script("pre-dump", tree);
	freeze(tree);
	event("begin");
	put_image(fd, "core-1.img", 1000);
	put_image(fd, "mm-1.img", 2000);
	pagemap = open_image(fd, "pagemap-1.img");
	pages = open_image(fd, "pages-1.img");
	event("images");
	write_all(pagemap, "pagemap", 7);
	feed(pages, memory, length, bytes);
	close(pages);
	close(pagemap);
	put_image(fd, "pstree.img", 200);
	put_image(fd, "inventory.img", 100);
	event("closed");
	if (script) {
		run_script("post-dump", tree);
		event("kill");
		kill_tree(tree);
		event("dead");
	} else {
		kill_tree(tree);
	}
	close(fd);
	event("end");
}

static uint64_t get_image(int fd, const char *name)
{
	static struct frame frame;
	static struct fields reply;
	uint64_t length;
	int pipe;

	request(fd, name);
	errno = EPROTO;
	if (!receive_frame(fd, &frame))
		die("%s: there is no answer", name);
	parse(&frame, &reply);
	errno = ENOENT;
	if (!reply.number[1])
		die("%s", name);
	if (!strcmp(name, "inventory.img"))
		event("inventory");
	pipe = hand_over(fd, 0);
	length = drain(pipe);
	close(pipe);
	return length;
}

static void restore(uint64_t bytes)
{
	pid_t tree = make_tree();
	uint64_t got;
	int fd;

	say("ready");
	go_on();
	run_script("pre-stream", 0);
	fd = connect_unix(dir, "streamer-serve.sock");
	event("connected");
	get_image(fd, "inventory.img");
	go_on();
	event("served");
	get_image(fd, "pstree.img");
	get_image(fd, "core-1.img");
	get_image(fd, "mm-1.img");
	get_image(fd, "pagemap-1.img");
	got = get_image(fd, "pages-1.img");
	event("done");
	errno = EPROTO;
	if (got != bytes)
		die("pages-1.img has %llu bytes", (unsigned long long)got);
	go_on();
	if (script) {
		freeze(tree);
		run_script("post-restore", tree);
		run_script("pre-resume", tree);
	}
	close(fd);
	event("end");
	kill_tree(tree);
}

/* ---- the remote dialect ---- */

static const char id[] = "bench";

static int open_remote(const char *socket, const char *name, const char *id, int mode)
{
	static struct frame frame;
	int fd = connect_unix(dir, socket);

	frame.length = 0;
	put_string(&frame, 1, name);
	put_string(&frame, 2, id);
	put_number(&frame, 3, mode);
	send_frame(fd, &frame);
	return fd;
}

static const char *image_name(int i)
{
	static char name[32];

	snprintf(name, sizeof(name), "image-%d.img", i);
	return name;
}

/* The finish is over when the daemon closes. */
static void finish(const char *socket, int mode)
{
	char c;
	int fd = open_remote(socket, "", "", mode);

	if (mode == O_RDONLY)
		while (read(fd, &c, 1) > 0)
			;
	close(fd);
}

static void write_image(int fd, const char *memory, size_t length, uint64_t bytes)
{
	enum { PIECE = 256 * KIB };
	size_t at = 0;

	while (bytes) {
		size_t piece = bytes < PIECE ? bytes : PIECE;

		if (at + piece > length)
			at = 0;
		write_all(fd, memory + at, piece);
		at += piece;
		bytes -= piece;
	}
	close(fd);
}

static void remote_dump(int n, uint64_t bytes)
{
	size_t length = bytes < POOL ? bytes : POOL;
	char *memory = make_memory(length);
	static struct frame frame;
	int fd;

	say("ready");
	go_on();
	event("begin");
	for (int i = 0; i < n; i++)
		write_image(open_remote("img-proxy.sock", image_name(i), id, O_WRONLY), memory, length, bytes);
	event("written");
	go_on();
	write_image(open_remote("img-proxy.sock", "inventory.img", id, O_WRONLY), memory, 100, 100);
	fd = open_remote("img-proxy.sock", "parent", "", O_APPEND);
	put_string(&frame, 1, id);
	send_frame(fd, &frame);
	close(fd);
	finish("img-proxy.sock", O_WRONLY);
	event("end");
}

static void remote_restore(int first, int n, uint64_t bytes)
{
	enum { BLOCK = 256 * KIB };
	char *block = malloc(BLOCK);
	static struct frame frame;
	static struct fields reply;

	say("ready");
	go_on();
	for (int i = first; i < first + n; i++) {
		int fd = open_remote("img-cache.sock", image_name(i), id, O_RDONLY);
		uint64_t got = 0;
		ssize_t got_now;

		if (i == first)
			event("waiting");
		errno = EPROTO;
		if (!receive_frame(fd, &frame))
			die("%s: there is no answer", image_name(i));
		parse(&frame, &reply);
		errno = reply.number[1];
		if (errno)
			die("%s", image_name(i));
		if (i == first)
			event("begin");
		while ((got_now = read(fd, block, BLOCK)) > 0)
			got += got_now;
		if (got_now < 0 || got != bytes)
			die("%s has %llu bytes", image_name(i), (unsigned long long)got);
		close(fd);
	}
	event("done");
	go_on();
	finish("img-cache.sock", O_RDONLY);
	event("end");
}

int main(int argc, char **argv)
{
	const char *verb = argc > 1 ? argv[1] : "";

	die_with_parent();
	signal(SIGPIPE, SIG_IGN);
	if (argc > 3) {
		dir = argv[2];
		dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (dir_fd < 0)
			die("%s", dir);
	}
	if (!strcmp(verb, "dump") && (argc == 4 || argc == 5)) {
		script = argv[4];
		dump(strtoull(argv[3], NULL, 10));
	} else if (!strcmp(verb, "restore") && (argc == 4 || argc == 5)) {
		script = argv[4];
		restore(strtoull(argv[3], NULL, 10));
	} else if (!strcmp(verb, "remote-dump") && argc == 5) {
		remote_dump(atoi(argv[3]), strtoull(argv[4], NULL, 10));
	} else if (!strcmp(verb, "remote-restore") && argc == 6) {
		remote_restore(atoi(argv[3]), atoi(argv[4]), strtoull(argv[5], NULL, 10));
	} else {
		return fputs("usage: see the head of fakecriu.c\n", stderr), 2;
	}
	return 0;
}
