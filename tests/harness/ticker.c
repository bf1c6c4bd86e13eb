/*
 * The process that the fault harness moves: a tree of two processes, the first of which has two threads, that
 * shows at any time on which host it runs, and whether its memory is whole.
 *
 *     ticker BOARD MIB_OF_THE_FIRST MIB_OF_THE_SECOND
 *
 * BOARD is a file that belongs to neither host: it is mapped, and is no part of the images. Once in a millisecond
 * each of the three actors (the first process, its thread, the second process) counts there, under the name of the
 * host that it finds itself on. So what runs twice, or has, is seen by whoever reads the board.
 *
 * When the board asks, each actor compares all that it has with what it must be: its own count with the one in
 * memory that the processes share, and every page with the tick that has last written to it.
 *
 * board.py knows the layout of the board.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / sizeof(uint64_t), HOSTS = 16, ACTORS = 3, THREAD_PAGES = 64 };

typedef _Atomic uint64_t word;

/* Host 0 is `source`, host N is `destination-N`; the last one is everything else. */
struct board {
	word question;
	word unused[7];
	struct place {
		word ticks, first, last; /* nanoseconds since 1970 */
		word answered, right;
		word gap_from, gap_to; /* the longest time between two ticks here */
		word unused;
	} place[HOSTS][ACTORS];
};

static struct board *board;
static word *shared; /* a count for each actor */

static void die(const char *what)
{
	perror(what);
	_exit(1);
}

static void *map(size_t length, int flags, int fd)
{
	void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd, 0);

	if (p == MAP_FAILED)
		die("mmap");
	return p;
}

static int host(void)
{
	struct utsname name;
	int number;

	if (uname(&name) != 0)
		return HOSTS - 1;
	if (strcmp(name.nodename, "source") == 0)
		return 0;
	if (sscanf(name.nodename, "destination-%d", &number) == 1 && number > 0 && number < HOSTS - 1)
		return number;
	return HOSTS - 1;
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9u;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

/* Word 0 of a page is the last tick that came to it, the others never change. */
static uint64_t content(int actor, size_t page, int i)
{
	return mix(((uint64_t)actor << 56) ^ ((uint64_t)page * WORDS + i));
}

static int is_right(int actor, const uint64_t *heap, size_t pages, uint64_t mine)
{
	for (size_t page = 0; page < pages; page++) {
		/* The largest tick up to this one that falls to the page; 0: none yet. */
		uint64_t last = mine < page ? 0 : mine - (mine - page) % pages;

		if (heap[page * WORDS] != last)
			return 0;
		for (int i = 1; i < WORDS; i++)
			if (heap[page * WORDS + i] != content(actor, page, i))
				return 0;
	}
	return atomic_load(&shared[actor]) == mine;
}

static void act(int actor, size_t pages)
{
	uint64_t *heap = map(pages * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	uint64_t mine = 0, answered = 0;

	for (size_t page = 0; page < pages; page++)
		for (int i = 1; i < WORDS; i++)
			heap[page * WORDS + i] = content(actor, page, i);
	for (;;) {
		static const struct timespec tick = { 0, 1000000 };
		struct place *place;
		struct timespec now;
		uint64_t ns, last, question;
		int before;

		nanosleep(&tick, NULL);
		mine++;
		atomic_store(&shared[actor], mine);
		heap[mine % pages * WORDS] = mine;

		/* It may be moved at any point here: only between two equal answers the time is that of the host. */
		before = host();
		clock_gettime(CLOCK_REALTIME, &now);
		if (host() != before)
			continue;
		place = &board->place[before][actor];
		ns = now.tv_sec * 1000000000ull + now.tv_nsec;
		last = atomic_load(&place->last);
		if (last == 0)
			atomic_store(&place->first, ns);
		else if (ns - last > atomic_load(&place->gap_to) - atomic_load(&place->gap_from)) {
			atomic_store(&place->gap_from, last);
			atomic_store(&place->gap_to, ns);
		}
		atomic_store(&place->last, ns);
		atomic_fetch_add(&place->ticks, 1);

		question = atomic_load(&board->question);
		if (question != answered) {
			answered = question;
			atomic_store(&place->right, is_right(actor, heap, pages, mine));
			atomic_store(&place->answered, question);
		}
	}
}

static void *thread(void *unused)
{
	act(1, THREAD_PAGES);
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t id;
	pid_t second;
	int fd;

	if (argc != 4)
		return 2;
	setsid();
	close_range(3, ~0U, 0); /* what a caller's caller left open could not be dumped */
	fd = open(argv[1], O_RDWR);
	if (fd < 0)
		die(argv[1]);
	board = map(sizeof *board, MAP_SHARED, fd);
	close(fd);
	shared = map(PAGE, MAP_SHARED | MAP_ANONYMOUS, -1);
	second = fork();
	if (second < 0)
		die("fork");
	if (second == 0)
		act(2, atoi(argv[3]) * (1024 * 1024 / PAGE));
	if (pthread_create(&id, NULL, thread, NULL) != 0)
		return 1;
	act(0, atoi(argv[2]) * (1024 * 1024 / PAGE));
}
