"""How many requests may be at work: as many as the model server needs to fill its batches, and no more.

What waits inside the model server waits there however light it is, in the order of arrival but for two priorities, and
can no longer be refused. So the waiting shall be done here, and only the next batch wait there. Raw latency cannot
tell: it rises with the size of the batches, on purpose. Time in the server's queue can, measured in its own compute
times: at a queue of one compute time each request finds one batch ahead of it in every instance, which fills the next
one without idling. Beyond that, more concurrency buys nothing but waiting.

By Little's law the time in the server grows in proportion to what is in it: from one measurement follows the limit that
would have kept the queue at the target, and that is where it goes, by half at most; up it goes by one at a time. All
workers look at the one queue they share, so their limits fall together and need not be divided.
"""

from service.admission.contract import Spent

TARGET = 1.25  # compute times in the server's queue: one, and room for noise
SLACK_S = 0.002  # below this a queue is noise, not a queue
LARGEST_DECREASE = 0.5
LEAST = 4
# A long queue is believed after so many requests, or, where they are fewer, after so long: one batch, or a few that
# others overtook, end together and prove nothing.
ENOUGH, ENOUGH_S = 32, 10.0
FIRST = 12  # too few costs a few seconds of growth under load, too many a queue that all must sit out


class AdaptiveLimit:
    """A limit between a few and `most`, which it is for as long as the server does not tell of its queue."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._least = min(LEAST, most)
        self._limit = float(most)
        self._before: Spent | None = None
        self._before_s = 0.0
        self._settled_s = 0.0
        self._wanted = False  # since the last measurement

    @property
    def value(self) -> int:
        """How many may be at work now, at least 1."""
        return int(self._limit)

    def adapt(self, spent: Spent, now_s: float, *, wanting: bool) -> None:
        """Take the server's totals; `wanting` says that requests wait, or were refused: more permits would be used.

        Who is refused comes back later, when nobody may be: so it holds until a measurement is there to act upon.
        """
        self._wanted |= wanting
        if self._before is None or spent.requests < self._before.requests:  # the first, or of a server that began anew
            self._before, self._before_s = spent, now_s
            self._limit = min(self._limit, FIRST)
            return
        requests = spent.requests - self._before.requests
        if requests == 0:
            self._before_s = now_s
            return
        if now_s < self._settled_s:
            return
        queue_s = (spent.queue_s - self._before.queue_s) / requests
        compute_s = (spent.compute_s - self._before.compute_s) / requests
        is_long = queue_s > TARGET * compute_s + SLACK_S
        if is_long and requests < ENOUGH and now_s < self._before_s + ENOUGH_S:
            return
        self._before, self._before_s = spent, now_s
        wanted, self._wanted = self._wanted, False
        if is_long:
            fitting = (TARGET + 1) * compute_s / (queue_s + compute_s)
            self._limit = max(self._limit * max(fitting, LARGEST_DECREASE), self._least)
        elif wanted:
            self._limit = min(self._limit + 1, self.most)
        else:
            return
        # What is in the server now was let in under the old limit: judge the new one by those who come after.
        self._settled_s = now_s + queue_s + compute_s
