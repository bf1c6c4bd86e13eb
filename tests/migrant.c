/*
 * The process that the tests migrate: it keeps state of many kinds and can tell at any time whether
 * all of it is still right.
 *
 *     migrant DIR [--tree] [--heap MIB] [--tcp] [--job]
 *
 * DIR/ready appears when everything is set up and holds the pid. Whenever DIR/ask appears, it is
 * removed, everything is checked, and DIR/answer appears:
 *
 *     ok counter=N pid=P procs=K uts=NAME      or      bad WHAT
 *
 * When DIR/scribble appears, it is removed, the root's heap is overwritten, which is wrong from then on, and
 * DIR/scribbled appears. When DIR/grow appears, it is removed, the root takes 64 MiB more, and DIR/grown appears.
 *
 * With --job it is a job, as of a shell: the process that was started leads a session, and its child is what
 * moves, in a process group of its own. The leader ends when that child has ended, and in the same way.
 *
 * Files in DIR are opened only for that moment: none is open when CRIU comes, unless by bad luck.
 * Standard input, output and error are the caller's business (give it /dev/null).
 *
 * Everything happens on a tick of a millisecond, in every process and thread. A check has two
 * halves: contents must be right, and what moves must have moved on since the question was asked.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	PAGE = 4096,
	WORDS = PAGE / sizeof(uint64_t),
	ROOT = 0, CHILD = 1, CHILD2 = 2, GRANDCHILD = 3, /* the grandchild is CHILD's */
	TREE = 4,
	THREADS = 2,
	SMALL = 500, /* small mappings, in CHILD */
	SHARED_PAGES = 64,
	OTHER_HEAP = 64, /* pages of heap in every process but the root */
	GHOST_PAGES = 4,
	EVENTS = 7,
	TIMER = 3600,
	PATIENCE = 10000, /* ticks until a process that does not answer is a failure */
};

typedef _Atomic uint64_t counter;

/* In shared anonymous memory: how the processes of a tree know of each other. */
struct shared {
	struct slot {
		counter ticks;   /* equal to the owner's private count */
		counter ready;
		counter checked; /* the last question answered */
		char bad[100];   /* and the answer; empty: all is right */
	} slot[TREE];
	counter question; /* number of the question that all must answer */
	uint64_t pages[SHARED_PAGES][WORDS];
};

static char dir[PATH_MAX];
static int processes = 1;
static int me = ROOT;
static uint64_t seed;
static uint64_t uptime; /* ticks since the start, in this process: goes on where it was */
static struct shared *shared;

static uint64_t *heap;
static size_t heap_pages;

static counter thread_count[THREADS];
static counter hops;      /* tokens that this process has passed on */
static counter exchanges; /* numbers sent over the socketpair and answered */
static const char *_Atomic broken; /* something that moves was wrong: stays */

static int timer = -1, ring_in = -1, ring_out = -1, pair = -1, ghost = -1, event = -1;
static int tcp[2] = { -1, -1 };
static uint64_t *small[SMALL];

static void die(const char *what)
{
	fprintf(stderr, "migrant: %s: %s\n", what, strerror(errno));
	_exit(1);
}

/* ---- contents ---- */

static uint64_t xorshift(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	return *state ^= *state << 17;
}

/* Each page has content of its own, so that one in another's place is found too. */
static uint64_t page_state(uint64_t kind, uint64_t index)
{
	uint64_t state = seed ^ (kind << 56) ^ ((index + 1) * 0x9e3779b97f4a7c15u);

	return state ? state : 1;
}

static void fill(uint64_t *page, uint64_t kind, uint64_t index)
{
	uint64_t state = page_state(kind, index);

	for (int i = 0; i < WORDS; i++)
		page[i] = xorshift(&state);
}

static int is_right(const uint64_t *page, uint64_t kind, uint64_t index)
{
	uint64_t state = page_state(kind, index), wrong = 0;

	for (int i = 0; i < WORDS; i++)
		wrong |= page[i] ^ xorshift(&state);
	return !wrong;
}

enum { GROWTH = 64 << 20 };

enum { HEAP = 10 /* plus the process */, SHARED_KIND = 20, SMALL_KIND = 21, GHOST_KIND = 22 };

static void *map(size_t length, int flags)
{
	void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		die("mmap");
	return p;
}

static void make_heap(size_t pages)
{
	heap_pages = pages;
	if (!pages)
		return;
	heap = map(pages * PAGE, MAP_PRIVATE);
	for (size_t i = 0; i < pages; i++)
		fill(heap + i * WORDS, HEAP + me, i);
}

static size_t small_length(int i)
{
	return (1 + i % 2) * PAGE;
}

/* Neighbours differ in protection, or the kernel would make one mapping of them. */
static void make_small(void)
{
	for (int i = 0; i < SMALL; i++) {
		small[i] = map(small_length(i), MAP_PRIVATE);
		for (size_t j = 0; j < small_length(i) / PAGE; j++)
			fill(small[i] + j * WORDS, SMALL_KIND, 2 * i + j);
		if (i % 2 && mprotect(small[i], small_length(i), PROT_READ))
			die("mprotect");
	}
}

/* A file without a name: CRIU carries its content in an image. */
static void make_ghost(void)
{
	char path[PATH_MAX + 10];
	uint64_t page[WORDS];

	snprintf(path, sizeof(path), "%s/ghost", dir);
	ghost = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (ghost < 0)
		die(path);
	for (int i = 0; i < GHOST_PAGES; i++) {
		fill(page, GHOST_KIND, i);
		if (write(ghost, page, PAGE) != PAGE)
			die(path);
	}
	if (unlink(path))
		die(path);
}

/* Both ends of a connection are ours. Without --tcp-established CRIU refuses to dump it. */
static void make_tcp(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0);

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	tcp[0] = socket(AF_INET, SOCK_STREAM, 0);
	if (listener < 0 || tcp[0] < 0 || bind(listener, (struct sockaddr *)&address, length) ||
	    listen(listener, 1) || getsockname(listener, (struct sockaddr *)&address, &length) ||
	    connect(tcp[0], (struct sockaddr *)&address, length))
		die("TCP on loopback");
	tcp[1] = accept(listener, NULL, NULL);
	if (tcp[1] < 0)
		die("accept");
	close(listener);
}

static int tcp_works(void)
{
	struct timeval patience = { .tv_sec = 5 };
	uint64_t got = 0;

	if (setsockopt(tcp[1], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)))
		return 0;
	return send(tcp[0], &uptime, sizeof(uptime), MSG_NOSIGNAL) == sizeof(uptime) &&
	       recv(tcp[1], &got, sizeof(got), MSG_WAITALL) == sizeof(got) && got == uptime;
}

static int event_works(void)
{
	uint64_t value = 0;

	return read(event, &value, sizeof(value)) == sizeof(value) && value == EVENTS &&
	       write(event, &value, sizeof(value)) == sizeof(value);
}

/*
 * A timer that rings in an hour; the time left may only shrink. (A short periodic one is no use: if
 * it has rung and has not been read, newer kernels show it as not armed, and so CRIU restores it.)
 */
static int timer_works(void)
{
	static time_t left = TIMER;
	struct itimerspec now;

	if (timerfd_gettime(timer, &now) || now.it_value.tv_sec > left ||
	    (!now.it_value.tv_sec && !now.it_value.tv_nsec))
		return 0;
	left = now.it_value.tv_sec;
	return 1;
}

/* The first half of a check. NULL: all is right. */
static const char *contents(void)
{
	for (size_t i = 0; i < heap_pages; i++)
		if (!is_right(heap + i * WORDS, HEAP + me, i))
			return "heap";
	if (tcp[0] >= 0 && !tcp_works())
		return "TCP connection";
	if (processes == 1)
		return NULL;

	for (int i = 0; i < SHARED_PAGES; i++)
		if (!is_right(shared->pages[i], SHARED_KIND, i))
			return "shared memory";
	if (atomic_load(&shared->slot[me].ticks) != uptime)
		return "shared counter";
	for (int i = 0; i < SMALL && small[0]; i++)
		for (size_t j = 0; j < small_length(i) / PAGE; j++)
			if (!is_right(small[i] + j * WORDS, SMALL_KIND, 2 * i + j))
				return "small mapping";
	for (int i = 0; i < GHOST_PAGES && ghost >= 0; i++) {
		uint64_t page[WORDS];

		if (pread(ghost, page, PAGE, (off_t)i * PAGE) != PAGE || !is_right(page, GHOST_KIND, i))
			return "ghost file";
	}
	if (event >= 0 && !event_works())
		return "eventfd";
	if (timer >= 0 && !timer_works())
		return "timerfd";
	return NULL;
}

/* ---- what moves ---- */

/* The count is kept twice, in memory and on the thread's stack. */
static void *count(void *argument)
{
	counter *mine = argument;
	struct timespec tick = { .tv_nsec = 1000000 };

	for (volatile uint64_t private = 0;;) {
		nanosleep(&tick, NULL);
		if (atomic_load(mine) != private)
			broken = "thread counter";
		private++;
		atomic_store(mine, private);
	}
	return NULL;
}

/* A token goes round all the processes, one higher at each hop. */
static void turn_ring(void)
{
	static uint64_t last;
	uint64_t token;
	ssize_t got = read(ring_in, &token, sizeof(token));

	if (got < 0 && errno == EAGAIN)
		return;
	if (got != sizeof(token) || (last && token != last + TREE) || token % TREE != (uint64_t)me) {
		broken = "token in the ring of pipes";
		return;
	}
	last = token++;
	if (write(ring_out, &token, sizeof(token)) != sizeof(token))
		broken = "pipe of the ring";
	hops++;
}

/* The root sends a number, the second child gives it back, inverted. */
static void exchange(void)
{
	static uint64_t sent;
	uint64_t number;
	ssize_t got = recv(pair, &number, sizeof(number), MSG_DONTWAIT);

	if (got < 0 && errno == EAGAIN && (me == CHILD2 || sent))
		return;
	if (me == ROOT && sent && (got != sizeof(number) || number != ~sent))
		broken = "answer on the socketpair";
	if (me == ROOT)
		number = sent = uptime + 1;
	else if (got == sizeof(number))
		number = ~number;
	else
		broken = "number on the socketpair";
	if (send(pair, &number, sizeof(number), MSG_NOSIGNAL) != sizeof(number))
		broken = "socketpair";
	exchanges++;
}

static void tick(void)
{
	struct timespec millisecond = { .tv_nsec = 1000000 };

	nanosleep(&millisecond, NULL);
	uptime++;
	if (processes == 1)
		return;
	atomic_store(&shared->slot[me].ticks, uptime);
	turn_ring();
	if (pair >= 0)
		exchange();
}

/* ---- questions and answers ---- */

/*
 * A check in the making. 1: done, with the verdict in slot->bad. The second half of a check ends
 * when every counter differs from its value at the beginning; if one never does, the root's
 * patience ends instead.
 */
static int check(int begin)
{
	static uint64_t before[THREADS + 2];
	struct slot *slot = &shared->slot[me];
	counter *moving[THREADS + 2];
	int n = 0;

	if (processes > 1) {
		for (int i = 0; i < THREADS; i++)
			moving[n++] = &thread_count[i];
		moving[n++] = &hops;
		if (pair >= 0)
			moving[n++] = &exchanges;
	}
	if (begin) {
		for (int i = 0; i < n; i++)
			before[i] = *moving[i];
		const char *bad = contents();
		snprintf(slot->bad, sizeof(slot->bad), "%s", bad ? bad : "");
	}
	for (int i = 0; i < n; i++)
		if (*moving[i] == before[i] && !broken && !slot->bad[0])
			return 0;
	if (broken)
		snprintf(slot->bad, sizeof(slot->bad), "%s", (const char *)broken);
	return 1;
}

/* One tick of the duty to answer the question in shared memory, in every process. */
static void answer_question(void)
{
	static uint64_t current;
	uint64_t question = shared->question;

	if (question == shared->slot[me].checked)
		return;
	if (check(question != current))
		shared->slot[me].checked = question;
	current = question;
}

/* A file that is there complete or not at all. */
static void put(const char *name, const char *format, ...)
{
	char to[PATH_MAX + 20], temporary[PATH_MAX + 20];
	va_list arguments;
	FILE *f;

	snprintf(to, sizeof(to), "%s/%s", dir, name);
	snprintf(temporary, sizeof(temporary), "%s/.%s.new", dir, name);
	f = fopen(temporary, "we");
	if (!f)
		return; /* DIR is gone: nobody to tell */
	va_start(arguments, format);
	vfprintf(f, format, arguments);
	va_end(arguments);
	if (!fclose(f))
		rename(temporary, to);
}

static int wished(const char *name)
{
	char path[PATH_MAX + 20];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	return !(uptime % 10) && !unlink(path);
}

/* What CRIU has dumped must not change any more, whatever this process does. */
static void scribble(void)
{
	if (!wished("scribble"))
		return;
	memset(heap, 0xff, heap_pages * PAGE);
	put("scribbled", "\n");
}

static void grow(void)
{
	if (!wished("grow"))
		return;
	memset(map(GROWTH, MAP_PRIVATE), 0x5a, GROWTH);
	put("grown", "\n");
}

/* The root's tick: takes questions from DIR and puts the answers there. */
static void serve(void)
{
	static uint64_t asked_at;
	char path[PATH_MAX + 20];
	struct utsname uts;

	if (!asked_at) {
		snprintf(path, sizeof(path), "%s/ask", dir);
		if (uptime % 10 || unlink(path))
			return;
		asked_at = uptime;
		shared->question++;
		return;
	}
	for (int i = 0; i < processes; i++) {
		struct slot *slot = &shared->slot[i];

		if (slot->checked != shared->question && uptime < asked_at + PATIENCE)
			return;
		if (slot->checked != shared->question || slot->bad[0]) {
			put("answer", "bad %s in process %d of the tree\n",
			    slot->checked != shared->question ? "nothing moves" : slot->bad, i);
			asked_at = 0;
			return;
		}
	}
	uname(&uts);
	put("answer", "ok counter=%llu pid=%d procs=%d uts=%s\n", (unsigned long long)uptime, (int)getpid(),
	    processes, uts.nodename);
	asked_at = 0;
}

/* ---- the tree ---- */

/* All die with the root: each one with its parent. */
static int become_child(int who)
{
	pid_t parent = getpid(), pid = fork();

	if (pid < 0)
		die("fork");
	if (pid)
		return 0;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
	me = who;
	return 1;
}

static void make_tree(void)
{
	int ring[TREE][2], ends[2];
	uint64_t token = TREE;

	for (int i = 0; i < TREE; i++)
		if (pipe2(ring[i], O_NONBLOCK)) /* ring[i] leads to process i */
			die("pipe2");
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
		die("socketpair");

	if (become_child(CHILD))
		become_child(GRANDCHILD);
	else
		become_child(CHILD2);

	/* Each keeps its own ends only, and its pipes are nobody else's. */
	ring_in = ring[me][0];
	ring_out = ring[(me + 1) % TREE][1];
	pair = me == ROOT ? ends[0] : me == CHILD2 ? ends[1] : -1;
	for (int i = 0; i < TREE; i++)
		for (int end = 0; end < 2; end++)
			if (ring[i][end] != ring_in && ring[i][end] != ring_out)
				close(ring[i][end]);
	for (int i = 0; i < 2; i++)
		if (ends[i] != pair)
			close(ends[i]);
	if (me == ROOT && write(ring_out, &(uint64_t){ token + CHILD }, sizeof(token)) != sizeof(token))
		die("write");
}

/* What a process of a tree has of its own. */
static void furnish(void)
{
	struct itimerspec hour = { .it_value.tv_sec = TIMER };
	pthread_t thread;

	for (int i = me; i < SHARED_PAGES; i += TREE)
		fill(shared->pages[i], SHARED_KIND, i);
	if (me == CHILD)
		make_small();
	if (me == CHILD2) {
		make_ghost();
		event = eventfd(EVENTS, EFD_NONBLOCK);
		if (event < 0)
			die("eventfd");
		timer = timerfd_create(CLOCK_MONOTONIC, 0);
		if (timer < 0 || timerfd_settime(timer, 0, &hour, NULL))
			die("timerfd");
	}
	for (int i = 0; i < THREADS; i++)
		if ((errno = pthread_create(&thread, NULL, count, &thread_count[i])))
			die("pthread_create");
}

/*
 * Goes on in a child, a job of the caller's session. Its leader is not moved, but CRIU must see it: that of the
 * session that we came from may be outside of our PID namespace.
 */
static void become_job(void)
{
	pid_t job = fork();
	int status;

	if (job < 0)
		die("fork");
	if (!job) {
		if (setpgid(0, 0))
			die("setpgid");
		return;
	}
	while (waitpid(job, &status, 0) < 0)
		if (errno != EINTR)
			die("waitpid");
	if (WIFEXITED(status))
		_exit(WEXITSTATUS(status));
	kill(getpid(), WTERMSIG(status)); /* what has ended our child ends us too */
	_exit(1);
}

int main(int argc, char **argv)
{
	const char *usage = "usage: migrant DIR [--tree] [--heap MIB] [--tcp] [--job]\n";
	size_t mib = 1;
	int with_tcp = 0, with_leader = 0, waiting;
	struct timespec now;

	if (argc < 2 || !realpath(argv[1], dir)) {
		fputs(usage, stderr);
		return 2;
	}
	for (int i = 2; i < argc; i++) {
		if (!strcmp(argv[i], "--tree"))
			processes = TREE;
		else if (!strcmp(argv[i], "--tcp"))
			with_tcp = 1;
		else if (!strcmp(argv[i], "--job"))
			with_leader = 1;
		else if (!strcmp(argv[i], "--heap") && i + 1 < argc)
			mib = strtoul(argv[++i], NULL, 10);
		else
			return fputs(usage, stderr), 2;
	}
	if (setsid() < 0 && with_leader) /* without: the caller has done it */
		die("setsid");
	close_range(3, ~0U, 0); /* what a caller's caller left open could not be restored */
	if (chdir("/"))
		die("/");
	if (with_leader)
		become_job();
	clock_gettime(CLOCK_REALTIME, &now);
	seed = (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;

	/* One process has its slot too, in private memory. */
	shared = map(sizeof(*shared), processes > 1 ? MAP_SHARED : MAP_PRIVATE);
	if (processes > 1)
		make_tree();
	make_heap(me == ROOT ? mib * 1024 * 1024 / PAGE : OTHER_HEAP);
	if (with_tcp && me == (processes > 1 ? CHILD2 : ROOT))
		make_tcp();
	if (processes > 1)
		furnish();
	shared->slot[me].ready = 1;

	do {
		tick();
		waiting = 0;
		for (int i = 0; i < processes; i++)
			waiting |= !shared->slot[i].ready;
	} while (waiting);
	if (me == ROOT)
		put("ready", "%d\n", (int)getpid());

	for (;;) {
		tick();
		if (me == ROOT) {
			scribble();
			grow();
			serve();
		}
		answer_question();
	}
}
