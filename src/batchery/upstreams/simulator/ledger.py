"""What happened, in numbers: every request counted once by its end, and every prompt remembered by its fingerprint.

It answers the questions that a test of a batch system asks of an upstream: was anything sent twice, was anything paid
twice, what was cut off. It must never keep more of a prompt than two small integers.
"""

from __future__ import annotations

import msgspec

_PAID = 1
_ATTEMPT = 2


class Stats(msgspec.Struct, frozen=True):
    """A snapshot. At any moment, received = answered + aborted + reset + truncated + in_flight + waiting.

    Args:
        received: requests to the inference endpoints, whatever became of them.
        answered: whole HTTP answers, of any status.
        by_status: those, by status.
        aborted: the client left before its answer.
        stalled: left without an answer on purpose; such a request is in flight until its client leaves, then aborted.
        reset: connections reset on purpose in place of an answer.
        truncated: answers cut in the middle of their body on purpose.
        malformed: answers with broken JSON, also counted in `answered`.
        in_flight: requests in a slot now.
        waiting: requests in the queue now.
        peak_in_flight: the most that were in a slot at once.
        distinct_prompts: different prompts among the requests that could be read.
        repeated_prompts: requests whose prompt had come before: retries, and needless repetitions.
        answered_ok_distinct: prompts that got a whole, valid 200.
        answered_ok_repeated: whole, valid 200s to prompts that had one already: paid twice.
        tokens: completion tokens in all whole, valid 200s.
        interactive: requests of others that got a slot; they are in none of the other counts but
            `peak_in_flight`.
        interactive_wait: seconds that they waited for it, on average.
        interactive_longest_wait: and at most.
        prompt_tokens: prompt tokens of all requests that got a slot.
        cached_tokens: those of them that were in the prefix cache.
    """

    received: int
    answered: int
    by_status: dict[int, int]
    aborted: int
    stalled: int
    reset: int
    truncated: int
    malformed: int
    in_flight: int
    waiting: int
    peak_in_flight: int
    distinct_prompts: int
    repeated_prompts: int
    answered_ok_distinct: int
    answered_ok_repeated: int
    tokens: int
    interactive: int = 0
    interactive_wait: float = 0.0
    interactive_longest_wait: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Ledger:
    """The running counts.

    Args:
        received: requests that are under way already when counting begins.
    """

    def __init__(self, received: int = 0) -> None:
        self.received = received
        self.answered = 0
        self.by_status: dict[int, int] = {}
        self.aborted = 0
        self.stalled = 0
        self.reset = 0
        self.truncated = 0
        self.malformed = 0
        self.repeated_prompts = 0
        self.answered_ok_distinct = 0
        self.answered_ok_repeated = 0
        self.tokens = 0
        self.interactive = 0
        self.interactive_waited = 0.0
        self.interactive_longest = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        # By fingerprint: twice the number of attempts, plus one once the prompt got its answer. One small integer a
        # prompt keeps a million of them within about 100 MB.
        self._prompts: dict[int, int] = {}

    def arrival(self, fingerprint: int) -> None:
        """A request with this prompt came."""
        if fingerprint in self._prompts:
            self.repeated_prompts += 1
        else:
            self._prompts[fingerprint] = 0

    def attempt(self, fingerprint: int) -> int:
        """Number the request with this prompt that is now accepted, from 1."""
        mark = self._prompts[fingerprint] + _ATTEMPT
        self._prompts[fingerprint] = mark
        return mark >> 1

    def answer(self, status: int) -> None:
        """A whole answer of this status was sent."""
        self.answered += 1
        self.by_status[status] = self.by_status.get(status, 0) + 1

    def payment(self, fingerprint: int, tokens: int) -> None:
        """The answer just sent is a whole, valid 200."""
        self.tokens += tokens
        mark = self._prompts.get(fingerprint, 0)
        if mark & _PAID:
            self.answered_ok_repeated += 1
        else:
            self.answered_ok_distinct += 1
            self._prompts[fingerprint] = mark | _PAID

    def interactive_start(self, waited: float) -> None:
        """A request of others got a slot after so many seconds."""
        self.interactive += 1
        self.interactive_waited += waited
        self.interactive_longest = max(self.interactive_longest, waited)

    def snapshot(self, *, in_flight: int, waiting: int, peak: int) -> Stats:
        """The counts as they stand, with what the slots say."""
        return Stats(
            received=self.received,
            answered=self.answered,
            by_status=dict(sorted(self.by_status.items())),
            aborted=self.aborted,
            stalled=self.stalled,
            reset=self.reset,
            truncated=self.truncated,
            malformed=self.malformed,
            in_flight=in_flight,
            waiting=waiting,
            peak_in_flight=peak,
            distinct_prompts=len(self._prompts),
            repeated_prompts=self.repeated_prompts,
            answered_ok_distinct=self.answered_ok_distinct,
            answered_ok_repeated=self.answered_ok_repeated,
            tokens=self.tokens,
            interactive=self.interactive,
            interactive_wait=self.interactive_waited / max(1, self.interactive),
            interactive_longest_wait=self.interactive_longest,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
        )
