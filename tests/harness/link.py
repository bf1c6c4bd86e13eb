"""The link between the two hosts: a middleman that can reset, hold up, refuse and delay it, and cut it at the
moment at which one side says something."""

import collections
import select
import socket
import struct
import threading
import time

CHUNK = 256 * 1024
ROOM = 8 * 1024 * 1024
TOP_BIT = 0x80000000

# Fields of Frame in proto/relay.proto.
DATA = 2
WORDS = {"release": 7, "rollback": 8, "stored": 23, "restore": 24, "released": 25, "rolled-back": 26}


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def fields(data):
    """The fields of a protobuf message that has varints and byte strings only."""
    at, found = 0, {}
    while at < len(data):
        key, at = varint(data, at)
        value, at = varint(data, at)
        if key & 7 == 2:
            value, at = data[at:at + value], at + value
        found[key >> 3] = value
    return found


class Parser:
    """Finds the frames in one direction of the relay protocol."""

    def __init__(self):
        self.head = b""
        self.skip = 0

    def feed(self, data):
        """(where the frame begins in `data`, its kind, its fields) for each that is complete."""
        at, found = 0, []
        start = -len(self.head)
        while at < len(data):
            if self.skip:
                step = min(self.skip, len(data) - at)
                self.skip -= step
                at += step
                start = at
                continue
            # The word, and then the message behind it.
            want = 4
            if len(self.head) >= 4:
                want += struct.unpack("=I", self.head[:4])[0] & ~TOP_BIT
            if len(self.head) < want:
                step = data[at:at + want - len(self.head)]
                self.head += step
                at += len(step)
            if len(self.head) < 4:
                continue
            word = struct.unpack("=I", self.head[:4])[0]
            if len(self.head) < 4 + (word & ~TOP_BIT):
                continue
            message = fields(self.head[4:])
            self.head = b""
            if word & TOP_BIT:
                for kind, body in message.items():
                    inner = fields(body)
                    found.append((start, kind, inner))
                    if kind == DATA:
                        self.skip = inner.get(2, 0)
            else:
                # The first word of the proxy: an image of the seed protocol.
                self.skip = message.get(4, 0)
            start = at
        return found


class Way:
    """One direction of a connection."""

    def __init__(self, source, sink):
        self.source, self.sink = source, sink
        self.queue = collections.deque()
        self.queued = 0
        self.ended = False
        self.shut = False
        self.parser = Parser()


def reset(sock):
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass
    sock.close()


class Link(threading.Thread):
    """`port` is where the proxy connects to, `target` where the cache listens."""

    def __init__(self, delay):
        super().__init__(daemon=True)
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(16)
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.target = None
        self.delay = delay
        # open, hole (nothing moves), refuse
        self.mode = "open"
        # (kind, state or None): where to cut; then for how long nobody can connect.
        self.cut_at = None
        self.cut_for = 0
        self.was_cut = None
        self.refuse_until = 0
        self.wishes = []
        self.ways = []
        self.parked = []
        self.wake_out, self.wake_in = socket.socketpair()
        self.wake_out.setblocking(False)
        # What was said, for the log: (when, towards the cache, kind, fields).
        self.said = []
        self.error = None

    # For other threads.

    def set(self, mode=None, delay=None):
        if mode is not None:
            self.mode = mode
        if delay is not None:
            self.delay = delay
        self.wake()

    def reset(self):
        self.wishes.append("reset")
        self.wake()

    def stop(self):
        self.wishes.append("stop")
        self.wake()
        self.join()
        self.wake_in.close()
        self.wake_out.close()

    def wake(self):
        self.wake_in.send(b"x")

    # The thread's own.

    def run(self):
        try:
            while self.step():
                pass
        except Exception as error:  # The run has failed then, and says so.
            self.error = error
        self.drop_all()
        for sock in [self.listener] + self.parked:
            sock.close()

    def drop_all(self):
        for way in self.ways:
            reset(way.source)
        self.ways = []

    def drop(self, way):
        for other in [other for other in self.ways if other.source in (way.source, way.sink)]:
            reset(other.source)
            self.ways.remove(other)

    def step(self):
        now = time.monotonic()
        moves = self.mode != "hole"
        reads, writes, timeout = [self.listener, self.wake_out], [], 1.0
        for way in self.ways if moves else []:
            if not way.ended and way.queued < ROOM:
                reads.append(way.source)
            if way.queue:
                if way.queue[0][0] <= now:
                    writes.append(way.sink)
                else:
                    timeout = min(timeout, way.queue[0][0] - now)
        reads, writes, _ = select.select(reads, writes, [], timeout)
        if self.wake_out in reads:
            self.wake_out.recv(4096)
        while self.wishes:
            if self.wishes.pop(0) == "stop":
                return False
            self.drop_all()
            return True
        if self.listener in reads:
            self.accept()
        if self.mode != "hole":
            for sock in self.parked:
                self.connect(sock)
            self.parked = []
        for way in list(self.ways):
            if way in self.ways and way.source in reads:
                self.read(way)
            if way in self.ways:
                self.write(way, way.sink in writes)
        return True

    def accept(self):
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        if self.mode == "refuse" or time.monotonic() < self.refuse_until:
            reset(sock)
        else:
            self.parked.append(sock)

    def connect(self, sock):
        if self.target is None:
            return reset(sock)
        other = socket.socket()
        try:
            other.connect(("127.0.0.1", self.target))
        except OSError:
            other.close()
            return reset(sock)
        for one in (sock, other):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ways += [Way(sock, other), Way(other, sock)]
        self.ways[-2].to_cache, self.ways[-1].to_cache = True, False

    def read(self, way):
        try:
            data = way.source.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            return self.drop(way)
        if not data:
            way.ended = True
            return
        now = time.monotonic()
        for start, kind, inner in way.parser.feed(data):
            if kind != DATA:
                self.said.append((time.time(), way.to_cache, kind, inner))
            if self.cut_at and kind == self.cut_at[0] and self.cut_at[1] in (None, inner.get(1)):
                self.cut_at = None
                self.was_cut = now
                self.refuse_until = now + self.cut_for
                return self.drop(way)
        way.queue.append((now + self.delay, memoryview(data)))
        way.queued += len(data)

    def write(self, way, ready):
        try:
            now = time.monotonic()
            while ready and way.queue and way.queue[0][0] <= now:
                due, data = way.queue[0]
                sent = way.sink.send(data)
                way.queued -= sent
                if sent < len(data):
                    way.queue[0] = (due, data[sent:])
                    return
                way.queue.popleft()
            if way.ended and not way.queue and not way.shut:
                way.shut = True
                way.sink.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError:
            return self.drop(way)
        if all(other.shut for other in self.ways if way.sink in (other.source, other.sink)):
            self.drop(way)
