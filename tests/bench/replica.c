/*
 * What image-proxy and image-cache of 2017 do, written anew: a thread for each connection, read and write of
 * 4 KiB, an image as a linked list of buffers of 4 KiB, forwarded when it is whole.
 *
 *     replica proxy DIR PORT       DIR/img-proxy.sock, to the cache at 127.0.0.1:PORT
 *     replica cache DIR            DIR/img-cache.sock; prints the port that it has chosen
 *
 * Kinder to itself than they were: any number of connections may wait to be accepted, an image of 2 GiB fits,
 * every reader is woken, threads have small stacks, and an image is found by a hash of its name.
 */
#include "bench.h"

#include <pthread.h>

enum { BUFFER = 4096, BUCKETS = 1 << 16 };

struct buffer {
	struct buffer *next;
	int length;
	char data[BUFFER];
};

struct image {
	struct image *next;
	char *name, *id;
	struct buffer *first;
	uint64_t size;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t arrival = PTHREAD_COND_INITIALIZER;
static struct image *images[BUCKETS];
static int ended; /* no image will come */

static pthread_mutex_t link_lock = PTHREAD_MUTEX_INITIALIZER;
static int to_cache = -1;
static void *(*serve)(void *);

static unsigned hash(const char *name, const char *id)
{
	unsigned h = 5381;

	while (*name)
		h = h * 33 + (unsigned char)*name++;
	while (*id)
		h = h * 33 + (unsigned char)*id++;
	return h % BUCKETS;
}

/* With the lock. */
static struct image *find(const char *name, const char *id)
{
	struct image *image = images[hash(name, id)];

	while (image && (strcmp(image->name, name) || strcmp(image->id, id)))
		image = image->next;
	return image;
}

static void add(struct image *image)
{
	struct image **bucket = &images[hash(image->name, image->id)];

	pthread_mutex_lock(&lock);
	image->next = *bucket;
	*bucket = image;
	pthread_cond_broadcast(&arrival);
	pthread_mutex_unlock(&lock);
}

/* Up to the end of file, or so many bytes. */
static struct image *receive_image(int fd, const struct fields *header, uint64_t size)
{
	struct image *image = calloc(1, sizeof(*image));
	struct buffer **end = &image->first;

	image->name = strdup(header->string[1]);
	image->id = strdup(header->string[2]);
	while (image->size < size) {
		struct buffer *buffer = *end;
		uint64_t left = size - image->size;
		size_t space;
		ssize_t n;

		if (!buffer) {
			buffer = *end = malloc(sizeof(*buffer));
			buffer->next = NULL;
			buffer->length = 0;
		}
		space = BUFFER - buffer->length;
		n = read(fd, buffer->data + buffer->length, left < space ? left : space);
		if (n < 0)
			die("%s: read", image->name);
		if (!n)
			break;
		image->size += n;
		buffer->length += n;
		if (buffer->length == BUFFER)
			end = &buffer->next;
	}
	return image;
}

static void send_image(int fd, const struct image *image)
{
	for (const struct buffer *buffer = image->first; buffer; buffer = buffer->next)
		write_all(fd, buffer->data, buffer->length);
}

/* One connection from the dump. */
static void *serve_dump(void *argument)
{
	int fd = (intptr_t)argument;
	struct frame *frame = malloc(sizeof(*frame));
	struct fields *header = malloc(sizeof(*header));

	if (!receive_frame(fd, frame)) {
		close(fd);
		return NULL;
	}
	parse(frame, header);
	if (!header->string[1][0]) { /* the finish */
		pthread_mutex_lock(&link_lock);
		exit(0);
	}
	struct image *image = receive_image(fd, header, UINT64_MAX);
	close(fd);
	frame->length = 0;
	put_string(frame, 1, image->name);
	put_string(frame, 2, image->id);
	put_number(frame, 3, O_APPEND);
	put_number(frame, 4, image->size);
	pthread_mutex_lock(&link_lock);
	send_frame(to_cache, frame);
	send_image(to_cache, image);
	pthread_mutex_unlock(&link_lock);
	add(image);
	free(frame);
	free(header);
	return NULL;
}

/* One connection from the restore. */
static void *serve_restore(void *argument)
{
	int fd = (intptr_t)argument;
	struct frame *frame = malloc(sizeof(*frame));
	struct fields *header = malloc(sizeof(*header));
	struct image *image;

	if (!receive_frame(fd, frame)) {
		close(fd);
		return NULL;
	}
	parse(frame, header);
	if (!header->string[1][0])
		exit(0);
	pthread_mutex_lock(&lock);
	while (!(image = find(header->string[1], header->string[2])) && !ended)
		pthread_cond_wait(&arrival, &lock);
	pthread_mutex_unlock(&lock);
	frame->length = 0;
	put_number(frame, 1, image ? 0 : ENOENT);
	send_frame(fd, frame);
	if (image)
		send_image(fd, image);
	close(fd);
	free(frame);
	free(header);
	return NULL;
}

static void *accept_all(void *argument)
{
	int listener = (intptr_t)argument;
	pthread_attr_t attributes;
	pthread_t thread;

	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, 64 * KIB);
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

		if (fd < 0)
			die("accept");
		if ((errno = pthread_create(&thread, &attributes, serve, (void *)(intptr_t)fd)))
			die("pthread_create");
	}
	return NULL;
}

static void receive_all(int listener)
{
	struct frame *frame = malloc(sizeof(*frame));
	struct fields *header = malloc(sizeof(*header));
	int fd = accept(listener, NULL, NULL);

	if (fd < 0)
		die("accept");
	while (receive_frame(fd, frame)) {
		parse(frame, header);
		add(receive_image(fd, header, header->number[4]));
	}
	pthread_mutex_lock(&lock);
	ended = 1;
	pthread_cond_broadcast(&arrival);
	pthread_mutex_unlock(&lock);
}

int main(int argc, char **argv)
{
	int is_proxy = argc == 4 && !strcmp(argv[1], "proxy"), listener, tcp = -1;
	pthread_t acceptor;
	uint16_t port = 0;

	die_with_parent();
	signal(SIGPIPE, SIG_IGN);
	if (is_proxy) {
		to_cache = connect_tcp(atoi(argv[3]));
		listener = listen_unix(argv[2], "img-proxy.sock");
	} else if (argc == 3 && !strcmp(argv[1], "cache")) {
		tcp = listen_tcp(&port);
		listener = listen_unix(argv[2], "img-cache.sock");
	} else {
		return fputs("usage: replica proxy DIR PORT | replica cache DIR\n", stderr), 2;
	}
	serve = is_proxy ? serve_dump : serve_restore;
	if ((errno = pthread_create(&acceptor, NULL, accept_all, (void *)(intptr_t)listener)))
		die("pthread_create");
	say("ready %d", port);
	if (!is_proxy)
		receive_all(tcp);
	pthread_join(acceptor, NULL);
	return 0;
}
