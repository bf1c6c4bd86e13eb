/*
 * The least that moving an image can cost: the same system calls with nothing around them.
 *
 *     bare pipeline BYTES [copy]   vmsplice -> pipe -> splice -> TCP -> splice -> pipe -> memfd;
 *                                  copy: the source reads and writes blocks of 256 KiB instead
 *     bare serve BYTES             splice memfd -> pipe, drained to nowhere
 *     bare warm BYTES              touches so much memory and frees it: where a virtual machine gives free
 *                                  pages back to its host, the first to write to them pays for getting them
 *
 * Says `ready`, waits for a line, prints when it began and ended, and the CPU seconds of each leg; each leg is
 * a process of its own.
 */
#include "bench.h"

enum { BLOCK = 256 * 1024 };

static void make_pipe(int ends[2])
{
	if (pipe2(ends, O_CLOEXEC) || fcntl(ends[1], F_SETPIPE_SZ, PIPE_SIZE) < 0)
		die("a pipe");
}

/* In the child: 0. */
static pid_t start(void)
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	if (!pid)
		die_with_parent();
	return pid;
}

static void end(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, 0) != pid || status)
		exit(1); /* it has said why */
}

static void source(int pipe, int tcp, int copies)
{
	static char block[BLOCK];
	double before = cpu();
	ssize_t n;

	if (copies)
		while ((n = read(pipe, block, sizeof(block))) > 0)
			write_all(tcp, block, n);
	else
		while ((n = splice(pipe, NULL, tcp, NULL, PIPE_SIZE, SPLICE_F_MOVE | SPLICE_F_MORE)) > 0)
			;
	if (n < 0)
		die("the source leg");
	say("source %.9f", cpu() - before);
}

static void sink(int tcp, uint64_t bytes)
{
	int ends[2], memory = memfd_create("image", MFD_CLOEXEC);
	double before = cpu();
	loff_t at = 0;
	ssize_t n;

	if (memory < 0)
		die("memfd_create");
	make_pipe(ends);
	while ((n = splice(tcp, NULL, ends[1], NULL, PIPE_SIZE, SPLICE_F_MOVE)) > 0)
		while (n) {
			ssize_t moved = splice(ends[0], NULL, memory, &at, n, SPLICE_F_MOVE);

			if (moved <= 0)
				die("splice to memory");
			n -= moved;
		}
	if (n < 0)
		die("splice from TCP");
	say("end %.9f", now());
	say("sink %.9f", cpu() - before);
	errno = EPROTO;
	if ((uint64_t)at != bytes)
		die("%llu bytes have arrived", (unsigned long long)at);
}

static void pipeline(uint64_t bytes, int copies)
{
	size_t length = bytes < POOL ? bytes : POOL;
	char *memory = make_memory(length);
	int ends[2], listener, tcp;
	uint16_t port;
	pid_t feeder, sinker;

	say("ready");
	if (!hear())
		exit(1);
	make_pipe(ends);
	listener = listen_tcp(&port);
	tcp = connect_tcp(port);
	sinker = start();
	if (!sinker) {
		close(tcp);
		close(ends[0]);
		close(ends[1]);
		sink(accept(listener, NULL, NULL), bytes);
		exit(0);
	}
	close(listener);
	feeder = start();
	if (!feeder) {
		close(tcp);
		close(ends[0]);
		say("begin %.9f", now());
		feed(ends[1], memory, length, bytes);
		exit(0);
	}
	close(ends[1]);
	source(ends[0], tcp, copies);
	close(tcp);
	end(feeder);
	end(sinker);
}

static void serve(uint64_t bytes)
{
	int ends[2], memory = memfd_create("image", MFD_CLOEXEC);
	char *pool = make_memory(POOL);
	pid_t drainer;

	if (memory < 0)
		die("memfd_create");
	for (uint64_t done = 0; done < bytes; done += POOL)
		write_all(memory, pool, bytes - done < POOL ? bytes - done : POOL);
	say("ready");
	if (!hear())
		exit(1);
	make_pipe(ends);
	drainer = start();
	if (!drainer) {
		close(ends[1]);
		errno = EPROTO;
		if (drain(ends[0]) != bytes)
			die("the drain");
		exit(0);
	}
	close(ends[0]);

	double begin = now(), before = cpu();
	for (loff_t at = 0; (uint64_t)at < bytes;)
		if (splice(memory, &at, ends[1], NULL, PIPE_SIZE, SPLICE_F_MOVE) <= 0)
			die("splice from memory");
	say("serve %.9f", cpu() - before);
	close(ends[1]);
	end(drainer);
	say("begin %.9f", begin);
	say("end %.9f", now());
}

static void warm(uint64_t bytes)
{
	if (mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0) == MAP_FAILED)
		die("mmap");
}

int main(int argc, char **argv)
{
	die_with_parent();
	if (argc >= 3 && !strcmp(argv[1], "pipeline"))
		pipeline(strtoull(argv[2], NULL, 10), argc > 3);
	else if (argc == 3 && !strcmp(argv[1], "serve"))
		serve(strtoull(argv[2], NULL, 10));
	else if (argc == 3 && !strcmp(argv[1], "warm"))
		return warm(strtoull(argv[2], NULL, 10)), 0;
	else
		return fputs("usage: bare pipeline BYTES [copy] | bare serve BYTES | bare warm BYTES\n", stderr), 2;
	say("done");
	return 0;
}
