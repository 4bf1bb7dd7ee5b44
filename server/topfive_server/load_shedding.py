"""Load shedding: in an overload whoever would wait too long is refused, and refusals themselves are kept cheap.

`WaitLimit` decides by the predicted wait; `_Growth` tells an overload from a burst, and `ClosedLoops` from many clients
that each wait for their answer before they ask again (a closed loop, as load tests call it).
"""

from collections import deque
from itertools import pairwise
from time import monotonic
from typing import Final

from topfive_server.errors import QueueFullError


class WaitLimit:
    """How long a request may have to wait for those before it, by the measured batch times.

    A burst is no overload, and neither are many patient clients that each ask again when they are answered: they are
    served, and wait as long as `max_wait` allows. An overload shows by a queue that keeps growing (`_Growth`), or that is
    too long for somebody: more comes than can be answered, and nothing that waits shortens the queue. From then on only
    what waits briefly is let in, the least that still fills batches well, until few are refused for it: so much can be served.
    """

    MAX_BATCHES: Final = 2.5
    """`max_wait` where none is set, in full batches."""
    LEAST_S: Final = 0.5
    """Least that this comes to: where batches are short, many clients are no overload, and neither is a pause of the machine."""
    OVERLOAD_BATCHES: Final = 0.3
    """`overload_wait` where none is set, in full batches."""
    OVERLOAD_LEAST_S: Final = 0.02
    """Least that this comes to."""
    GROWN_BATCHES: Final = 0.8
    """From how long a wait on, in full batches, growth shows an overload: half as many images must have been added.

    At half a batch the queue of 95 % of what can be served is often enough, by chance."""
    GROWN_LEAST_S: Final = 0.05
    """Least that this comes to."""
    CALM_S: Final = 1.0
    """Seconds after which the overload is over if nobody has been refused in them, or less than `CALM_SHARE`."""
    CALM_SHARE: Final = 0.1
    """Short waits cost a tenth of the throughput: so much is refused for them where all could be served."""
    LONGEST_S: Final = 60.0
    """Seconds after which an overload has to show anew, whoever asks."""
    LOOPS_LONGEST_S: Final = 10.0
    """The same where it is clients in a loop: those that ask again as soon as they are refused never let it become calm, and
    may be few enough to be served. (A slow model refused some of 64 for a minute, since all began at once.)"""

    def __init__(self, *, max_wait_s: float, overload_wait_s: float) -> None:
        """In seconds; 0 takes the multiple of a full batch's time."""
        self._max_wait_s = max_wait_s
        self._overload_wait_s = overload_wait_s
        self._began_at: float | None = None
        """When the overload began; None without one."""
        self._refused_at = self._counted_since = 0.0
        self._asked = self._refused = 0
        self._growth = _Growth()

    def check(
        self, wait_s: float, images: int, *, full_batch_s: float, max_batch: int, loops: bool = False
    ) -> None:
        """Refuse whoever would wait too long.

        Args:
            wait_s: predicted for this request.
            images: before it, those that are being computed included.
            full_batch_s: predicted time of a full batch.
            max_batch: images of a full batch.
            loops: whether most who ask are clients in a loop, whose number grows until all have come (`ClosedLoops`).

        Raises:
            QueueFullError: longer than is allowed at present.
        """
        now = monotonic()
        limit_s = self._max_wait_s or max(self.MAX_BATCHES * full_batch_s, self.LEAST_S)
        long_s = max(self.GROWN_BATCHES * full_batch_s, self.GROWN_LEAST_S)
        self._growth.observe(now, images)
        growing = not loops and wait_s >= long_s and self._growth.images >= self.GROWN_BATCHES / 2 * max_batch
        lasts = self._overload(now, loops=loops)
        if growing or lasts:
            short_s = max(self.OVERLOAD_BATCHES * full_batch_s, self.OVERLOAD_LEAST_S)
            limit_s = min(limit_s, self._overload_wait_s or short_s)
        self._asked += 1
        if wait_s > limit_s:
            if not lasts:
                self._began_at = self._counted_since = now
                self._asked, self._refused = 1, 0
            self._refused_at = now
            self._refused += 1
            raise QueueFullError(
                f"the images before this one take {wait_s * 1000:.0f} ms; "
                f"at the present load at most {limit_s * 1000:.0f} ms are waited for",
                retry_after_s=wait_s - limit_s,
            )

    def _overload(self, now: float, *, loops: bool) -> bool:
        """Whether it lasts."""
        if self._began_at is None:
            return False
        longest_s = self.LOOPS_LONGEST_S if loops else self.LONGEST_S
        calm = now - self._refused_at >= self.CALM_S or now - self._began_at >= longest_s
        if now - self._counted_since >= self.CALM_S:
            calm = calm or self._refused < self.CALM_SHARE * self._asked
            self._counted_since, self._asked, self._refused = now, 0, 0
        if calm:
            self._began_at = None
        return self._began_at is not None


class _Growth:
    """By how much the queue has grown for longer than a burst lasts, beyond all that it has been of late.

    Clients that ask when they are answered make it jump once, to as many as they are, and never beyond; an overload makes
    it grow as long as it lasts. What counts is each slot's longest queue: in `RISES` of `SLOTS` slots above the one before.
    (Not in all of them: at twice the rate that can be served chance held up one overload in five for half a second.)
    """

    SLOT_S: Final = 0.08
    SLOTS: Final = 6
    RISES: Final = 4
    REMEMBERED_S: Final = 5.0

    def __init__(self) -> None:
        self._slots: deque[tuple[int, int]] = deque(maxlen=round(self.REMEMBERED_S / self.SLOT_S))
        """Number of each slot in which somebody came, and the longest queue that was found."""
        self._latest = 0

    def observe(self, now: float, images: int) -> None:
        """Take into account how many images somebody found before him."""
        slots = self._slots
        slot = int(now / self.SLOT_S)
        if slots and slots[-1][0] == slot:
            slots[-1] = slot, max(slots[-1][1], images)
        else:
            slots.append((slot, images))
        self._latest = images

    @property
    def images(self) -> int:
        """Images by which the queue that was found last has grown, 0 where it is no trend."""
        history = list(self._slots)
        run = history[-self.SLOTS - 1 :]
        (begin, found), (end, longest) = run[0], run[-1]
        rises = sum(one < next_ for (_, one), (_, next_) in pairwise(run)) >= self.RISES
        in_a_row = len(run) > self.SLOTS and end - begin <= self.SLOTS + 1
        record = all(earlier < longest for _, earlier in history[:-1])
        return longest - found if rises and in_a_row and record and self._latest == longest else 0


class ClosedLoops:
    """Whether those who are answered ask again at once, on the same connection.

    Then they are so many as they are: a queue of theirs that grows is one that they are still coming to. Requests that come by
    themselves find connections that are kept and were answered the moment before as well, but only few of a whole batch.
    """

    LEAST_BATCH: Final = 8
    """Images of a batch from which on its answers are looked at."""
    PROMPT_S: Final = 0.02
    """Seconds after an answer within which a loop asks again."""
    SHARE: Final = 0.7
    """Of the answers that are followed by a request, from which on it is loops."""
    LEAST: Final = 16
    MOST: Final = 64
    """Answers that are looked at."""

    def __init__(self) -> None:
        self._answered = 0.0
        self._followed = 0.0

    def answered(self) -> None:
        """A request was served out of a batch that is large enough."""
        self._answered += 1
        if self._answered >= self.MOST:
            self._answered /= 2
            self._followed /= 2

    def asked(self, since_answer_s: float | None) -> bool:
        """A request begins, so long after the answer to the one before on its connection: whether it is loops that ask."""
        if since_answer_s is not None and since_answer_s < self.PROMPT_S:
            self._followed += 1
        return self._answered >= self.LEAST and self._followed >= self.SHARE * self._answered


class Refusals:
    """How often refusals are answered: who is refused and asks again at once would else take the cores from the others.

    A refusal costs the event loop a fifth of a millisecond. 64 clients that do not heed `Retry-After` made 5,000 a second,
    and left a third of the throughput (docs/lab-notes.md). So beyond a rate in proportion to what is served, a connection
    that was refused is read from again only after a moment: a refusal is as quick as ever, the next one is not.
    """

    LEAST_PER_S: Final = 200.0
    """Refusals a second that are answered whatever is served."""
    PER_ANSWER: Final = 1.0
    """Refusals for each request served that are answered beyond that."""
    LONGEST_S: Final = 1.0
    """Longest pause: `Retry-After` says at least as much."""

    def __init__(self) -> None:
        self._left = self.LEAST_PER_S
        self._at = monotonic()

    def answered(self) -> None:
        """A request was served."""
        self._left = min(self._left + self.PER_ANSWER, self.LEAST_PER_S)

    def refuse(self) -> float:
        """A request is refused: seconds for which its connection is not to be read from, usually 0."""
        now = monotonic()
        self._left = min(self._left + self.LEAST_PER_S * (now - self._at), self.LEAST_PER_S) - 1
        self._at = now
        longest = self.LEAST_PER_S * self.LONGEST_S
        self._left = max(self._left, -longest)
        return max(0.0, -self._left / self.LEAST_PER_S)
