"""The board on which the moved processes show where they run: see ticker.c, whose layout this is."""

import mmap
import os
import struct
import time

HOSTS = 16
ACTORS = 3
WORD = struct.Struct("@Q")
PLACE = struct.Struct("@QQQQQQQ8x")
HEADER = 64


class Board:
    def __init__(self, path):
        size = HEADER + HOSTS * ACTORS * PLACE.size
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(fd, size)
        self.map = mmap.mmap(fd, size)
        os.close(fd)
        self.question = 0
        # For `running`: what was seen, and when.
        self.seen = []

    def place(self, host, actor):
        """(ticks, first, last, answered, right, gap_from, gap_to)"""
        return PLACE.unpack_from(self.map, HEADER + (host * ACTORS + actor) * PLACE.size)

    def ticks(self):
        return [[self.place(host, actor)[0] for actor in range(ACTORS)] for host in range(HOSTS)]

    def look(self):
        """To be called every few milliseconds, for `running`."""
        now = time.monotonic()
        if not self.seen or now - self.seen[-1][0] > 0.005:
            self.seen.append((now, self.ticks()))
            # The youngest that is old enough stays.
            while len(self.seen) > 1 and now - self.seen[1][0] > 0.06:
                self.seen.pop(0)

    def running(self):
        """For each host on which any actor has counted in the last 60 ms: how many have. A busy machine may take
        longer for one tick; whoever finds fewer than all asks again."""
        if not self.seen or time.monotonic() - self.seen[0][0] < 0.05:
            return None
        before, now = self.seen[0][1], self.ticks()
        found = {}
        for host in range(HOSTS):
            count = sum(now[host][actor] != before[host][actor] for actor in range(ACTORS))
            if count:
                found[host] = count
        return found

    def ask(self):
        self.question += 1
        WORD.pack_into(self.map, 0, self.question)

    def answers(self, host):
        """For each actor that has answered the last question on this host: whether all is right."""
        places = (self.place(host, actor) for actor in range(ACTORS))
        return [right == 1 for (_, _, _, answered, right, _, _) in places if answered == self.question]

    def overlaps(self):
        """Hosts that it has not been on one after the other: [(one, other, milliseconds)]. With milliseconds the
        one stood still while the other ran, for so long, and ran again; None: both ran at the same time."""
        spans, gaps = {}, {}
        for host in range(HOSTS):
            places = [self.place(host, actor) for actor in range(ACTORS)]
            places = [place for place in places if place[0]]
            if places:
                # Each actor counts for all.
                spans[host] = min(place[1] for place in places), max(place[2] for place in places)
                gaps[host] = max(place[5] for place in places), min(place[6] for place in places)
        found = []
        for one, (first, last) in spans.items():
            for other, (begin, end) in spans.items():
                if other <= one or last < begin or end < first:
                    continue
                inside = gaps[one][0] < begin and end < gaps[one][1]
                found.append((one, other, (end - begin) / 1e6 if inside else None))
        return found
