/* What the bench's helper programs share. Included once by each of them. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define KIB 1024ul
#define MIB (1024 * KIB)
#define PIPE_SIZE MIB          /* of a bare pipeline */
#define POOL (256 * MIB)       /* the memory that is sent: more than any processor's cache holds */

#define UNUSED __attribute__((unused))

UNUSED static void die(const char *format, ...)
{
	int error = errno;
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fprintf(stderr, ": %s\n", strerror(error));
	exit(1);
}

static double clock_of(clockid_t id)
{
	struct timespec t;

	clock_gettime(id, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* The same clock in all processes of the bench. */
UNUSED static double now(void)
{
	return clock_of(CLOCK_MONOTONIC);
}

/* Of this process, all its threads. */
UNUSED static double cpu(void)
{
	return clock_of(CLOCK_PROCESS_CPUTIME_ID);
}

/* One line of the conversation with the driver. */
UNUSED static void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	putchar('\n');
	fflush(stdout);
}

/* A line from the driver, whatever it is; 0: there is no driver any more. */
UNUSED static int hear(void)
{
	char c;
	ssize_t n;

	while ((n = read(0, &c, 1)) == 1 && c != '\n')
		;
	return n == 1;
}

/* No process of the bench outlives the one that started it. */
UNUSED static void die_with_parent(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
}

UNUSED static void write_all(int fd, const void *data, size_t length)
{
	for (size_t done = 0; done < length;) {
		ssize_t n = write(fd, (const char *)data + done, length - done);

		if (n < 0)
			die("write");
		done += n;
	}
}

/* 0: the end has come first, before any byte. */
UNUSED static int read_all(int fd, void *data, size_t length)
{
	for (size_t done = 0; done < length;) {
		ssize_t n = read(fd, (char *)data + done, length - done);

		if (n < 0)
			die("read");
		if (!n && !done)
			return 0;
		if (!n) {
			errno = EPIPE;
			die("read: the end has come too early");
		}
		done += n;
	}
	return 1;
}

/*
 * Memory as a process has it that is to be moved: touched, every page different. No huge pages: with them,
 * the figures would depend on how many the machine has just now.
 */
UNUSED static char *make_memory(size_t length)
{
	char *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t state = 0x9e3779b97f4a7c15u;

	if (memory == MAP_FAILED)
		die("mmap");
	madvise(memory, length, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < length; i += sizeof(state)) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		memcpy(memory + i, &state, sizeof(state));
	}
	return memory;
}

/* Hands memory to a pipe without copying it, in pieces as CRIU's: between 64 KiB and 1 MiB. */
UNUSED static void feed(int pipe, char *memory, size_t length, uint64_t total)
{
	static const size_t pieces[] = { 64 * KIB, 256 * KIB, MIB, 128 * KIB, 512 * KIB };
	size_t at = 0;

	for (int turn = 0; total; turn++) {
		size_t piece = pieces[turn % 5];

		if (piece > total)
			piece = total;
		if (at + piece > length)
			at = 0;
		struct iovec iov = { memory + at, piece };
		while (iov.iov_len) {
			ssize_t n = vmsplice(pipe, &iov, 1, 0);

			if (n < 0)
				die("vmsplice");
			iov.iov_base = (char *)iov.iov_base + n;
			iov.iov_len -= n;
		}
		at += piece;
		total -= piece;
	}
}

/* Everything up to the end of a pipe, to nowhere. */
UNUSED static uint64_t drain(int pipe)
{
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	uint64_t total = 0;
	ssize_t n;

	if (null < 0)
		die("/dev/null");
	while ((n = splice(pipe, NULL, null, NULL, PIPE_SIZE, 0)) > 0)
		total += n;
	if (n < 0)
		die("splice to /dev/null");
	close(null);
	return total;
}

UNUSED static int listen_tcp(uint16_t *port)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	socklen_t length = sizeof(address);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, length) || listen(fd, 1) ||
	    getsockname(fd, (struct sockaddr *)&address, &length))
		die("a listening TCP socket");
	*port = ntohs(address.sin_port);
	return fd;
}

UNUSED static int connect_tcp(uint16_t port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)))
		die("connect to port %d", port);
	return fd;
}

static struct sockaddr_un unix_address(const char *dir, const char *name)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (snprintf(address.sun_path, sizeof(address.sun_path), "%s/%s", dir, name) >=
	    (int)sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		die("%s", dir);
	}
	return address;
}

UNUSED static int listen_unix(const char *dir, const char *name)
{
	struct sockaddr_un address = unix_address(dir, name);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 4096))
		die("%s", address.sun_path);
	return fd;
}

UNUSED static int connect_unix(const char *dir, const char *name)
{
	struct sockaddr_un address = unix_address(dir, name);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)))
		die("%s", address.sun_path);
	return fd;
}

/* ---- CRIU's messages: a length in the host's order, then protobuf ---- */

struct frame {
	uint32_t length;
	unsigned char body[9000];
};

UNUSED static void put_number(struct frame *frame, int field, uint64_t value)
{
	frame->body[frame->length++] = field << 3;
	for (; value >= 0x80; value >>= 7)
		frame->body[frame->length++] = value | 0x80;
	frame->body[frame->length++] = value;
}

UNUSED static void put_string(struct frame *frame, int field, const char *string)
{
	size_t length = strlen(string);

	put_number(frame, field, length);
	frame->body[frame->length - 2 - (length >= 0x80)] |= 2; /* before the length's one or two bytes */
	memcpy(frame->body + frame->length, string, length);
	frame->length += length;
}

UNUSED static void send_frame(int fd, const struct frame *frame)
{
	write_all(fd, frame, sizeof(frame->length) + frame->length);
}

/* 0: the end has come instead. */
UNUSED static int receive_frame(int fd, struct frame *frame)
{
	if (!read_all(fd, &frame->length, sizeof(frame->length)))
		return 0;
	errno = EPROTO;
	if (frame->length > sizeof(frame->body))
		die("a message of %u bytes", frame->length);
	if (frame->length && !read_all(fd, frame->body, frame->length))
		die("a message without its body");
	return 1;
}

/* What fields 1 to 4 of a message hold: numbers, or strings of less than 4096 bytes. */
struct fields {
	uint64_t number[5];
	char string[5][4096];
};

UNUSED static uint64_t get_number(const struct frame *frame, uint32_t *at)
{
	uint64_t value = 0;

	for (int shift = 0; *at < frame->length; shift += 7) {
		unsigned char c = frame->body[(*at)++];

		value |= (uint64_t)(c & 0x7f) << shift;
		if (c < 0x80)
			break;
	}
	return value;
}

UNUSED static void parse(const struct frame *frame, struct fields *fields)
{
	memset(fields->number, 0, sizeof(fields->number));
	for (int i = 0; i < 5; i++)
		fields->string[i][0] = 0;
	for (uint32_t at = 0; at < frame->length;) {
		uint64_t tag = get_number(frame, &at), value = get_number(frame, &at);
		int field = tag >> 3 > 4 ? 0 : tag >> 3;

		if ((tag & 7) == 0) {
			fields->number[field] = value;
		} else if ((tag & 7) == 2 && value < 4096 && at + value <= frame->length) {
			memcpy(fields->string[field], frame->body + at, value);
			fields->string[field][value] = 0;
			at += value;
		} else {
			errno = EPROTO;
			die("a message's field %d", (int)(tag >> 3));
		}
	}
}
