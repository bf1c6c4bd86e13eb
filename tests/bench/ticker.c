/*
 * The process that is moved when a standstill is measured.
 *
 *     ticker FILE MIB
 *
 * It has MIB of touched memory (0: 8 KiB), and looks at the clock each millisecond. In its first page, which is FILE
 * mapped, it keeps what it has seen: how often it has looked, and the longest time between two looks.
 * Two clocks, since a restored process may have its own monotonic one: the longer time counts.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t nanoseconds(clockid_t id)
{
	struct timespec t;

	clock_gettime(id, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(int argc, char **argv)
{
	static const clockid_t clocks[] = { CLOCK_MONOTONIC, CLOCK_REALTIME };
	struct timespec millisecond = { .tv_nsec = 1000000 };
	uint64_t state = 0x9e3779b97f4a7c15u, last[2];
	volatile uint64_t *page; /* looks, longest */
	size_t length;
	uint64_t *heap;
	int fd;

	if (argc != 3)
		return fputs("usage: ticker FILE MIB\n", stderr), 2;
	length = strtoull(argv[2], NULL, 10) << 20;
	if (!length)
		length = 8192;
	fd = open(argv[1], O_RDWR | O_CLOEXEC);
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	heap = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (fd < 0 || page == MAP_FAILED || heap == MAP_FAILED || chdir("/"))
		return perror("ticker"), 1;
	close(fd);
	close_range(3, ~0U, 0);
	for (size_t i = 0; i < length / sizeof(*heap); i++) {
		state ^= state << 13;
		state ^= state >> 7;
		heap[i] = state ^= state << 17;
	}
	for (int i = 0; i < 2; i++)
		last[i] = nanoseconds(clocks[i]);
	for (;;) {
		nanosleep(&millisecond, NULL);
		for (int i = 0; i < 2; i++) {
			uint64_t t = nanoseconds(clocks[i]);

			if (t > last[i] && t - last[i] > page[1])
				page[1] = t - last[i];
			last[i] = t;
		}
		page[0]++;
	}
}
