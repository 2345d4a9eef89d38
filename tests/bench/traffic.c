/* SPDX-License-Identifier: Apache-2.0 */
/* Traffic for bench_traffic.py, in C so that the generator costs little beside the kernel.
 *
 *   traffic serve PORT              answers on PORT (bytes back), swallows on PORT+1, one connection
 *                                   and one byte at a time on PORT+2; until killed
 *   traffic rr ADDRESS PORT MS      one-byte round trips on one connection; prints how many a second
 *   traffic bulk ADDRESS PORT MS    one stream; prints bits per second
 *   traffic crr ADDRESS PORT MS     new connection, one byte there and back, closed; prints per second
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 18];

static void die(const char *what)
{
	fprintf(stderr, "traffic: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec + at.tv_nsec / 1e9;
}

static int stream(void)
{
	int one = 1;
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (fd < 0)
		die("socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return fd;
}

static int listening(int port)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = stream();

	if (bind(fd, (struct sockaddr *)&at, sizeof(at)) || listen(fd, 1024))
		die("listen");
	return fd;
}

static void answer(int listener)
{
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		ssize_t got;

		if (fd < 0)
			continue;
		while ((got = read(fd, buffer, sizeof(buffer))) > 0)
			if (write(fd, buffer, got) != got)
				break;
		close(fd);
	}
}

static void swallow(int listener)
{
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		if (fd < 0)
			continue;
		while (read(fd, buffer, sizeof(buffer)) > 0)
			;
		close(fd);
	}
}

static void serve(int port)
{
	int listeners[3] = { listening(port), listening(port + 1), listening(port + 2) };

	puts("ready");
	fflush(stdout);
	for (int i = 0; i < 2; i++)
		if (!fork())
			i ? swallow(listeners[1]) : answer(listeners[0]);
	answer(listeners[2]);
}

static int dial(const char *address, int port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
	struct timeval patience = { .tv_sec = 5 };
	int fd = stream();

	inet_pton(AF_INET, address, &to.sin_addr);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
		die("connect");
	return fd;
}

static void turn(int fd)
{
	if (write(fd, "x", 1) != 1 || read(fd, buffer, 1) != 1)
		die("round trip");
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve(atoi(argv[2]));
	if (argc != 5)
		return 2;
	const char *address = argv[2];
	int port = atoi(argv[3]);
	double began, seconds = atoi(argv[4]) / 1e3, count = 0;

	if (!strcmp(argv[1], "crr")) {
		/* Reset on close: the client's ports do not pile up waiting. */
		struct linger at_once = { .l_onoff = 1 };

		for (began = now(); now() - began < seconds; count++) {
			int fd = dial(address, port + 2);

			turn(fd);
			setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
			close(fd);
		}
	} else if (!strcmp(argv[1], "rr")) {
		int fd = dial(address, port);

		for (began = now(); now() - began < seconds; count++)
			turn(fd);
	} else {
		int fd = dial(address, port + 1);

		for (began = now(); now() - began < seconds;) {
			ssize_t sent = write(fd, buffer, sizeof(buffer));

			if (sent < 0)
				die("write");
			count += sent * 8.0;
		}
	}
	printf("%.1f\n", count / (now() - began));
	return 0;
}
