"""What the simulator answers: the paths it serves, the gate before them, and each request's way through its slot.

It connects the pure parts to time and to connections. It must never decide by itself what ought to repeat from run to
run: that is for `outcomes` to decide.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import random
import time

import msgspec

from batchery.upstreams.simulator.answers import allowed, answer_body, error_body, fault_body, html_body, models_body
from batchery.upstreams.simulator.behaviour import Behaviour
from batchery.upstreams.simulator.ledger import Ledger, Stats
from batchery.upstreams.simulator.outcomes import Dice, Fault, Outcome, read_directive
from batchery.upstreams.simulator.prefix_cache import PrefixCache
from batchery.upstreams.simulator.protocol import HTML, JSON, MAX_BODY, MAX_HEAD, Exchange, phrase
from batchery.upstreams.simulator.requests import Endpoint, Request, read_request
from batchery.upstreams.simulator.slots import Slots
from batchery.wire.errors import ApiError, BadRequest, MethodNotAllowed, NotFound, Unauthorized

INFERENCE = {
    prefix + path: endpoint
    for prefix in (b"", b"/v1")
    for path, endpoint in (
        (b"/chat/completions", Endpoint.CHAT),
        (b"/completions", Endpoint.COMPLETIONS),
        (b"/embeddings", Endpoint.EMBEDDINGS),
        (b"/responses", Endpoint.RESPONSES),
    )
}
MODELS = (b"/models", b"/v1/models")
HEALTH = b"/healthz"
METRICS = b"/metrics"
STATS = b"/simulator/stats"
RESET = b"/simulator/reset"

PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"

_READING = {b"GET": "GET", b"HEAD": "HEAD"}
_POSTING = {b"POST": "POST"}
_METHODS = {
    **dict.fromkeys((*INFERENCE, RESET), _POSTING),
    **dict.fromkeys((*MODELS, HEALTH, METRICS, STATS), _READING),
}
_PATHS = ", ".join(path.decode() for path in _METHODS if not path.startswith(b"/v1"))

_REFUSALS = {
    400: "This is not a request in HTTP/1.1 or HTTP/1.0.",
    413: f"The body is larger than {MAX_BODY} bytes.",
    431: f"The headers are larger than {MAX_HEAD} bytes.",
}


class _Ticket(msgspec.Struct, eq=False):
    """A request on its way to an answer."""

    exchange: Exchange
    request: Request
    attempt: int
    tokens: int
    outcome: Outcome
    prompt: bytes
    cached: int = 0
    timer: asyncio.TimerHandle | None = None


class _Visitor(msgspec.Struct, eq=False):
    """A request of others than the client under test, which needs no answer."""

    number: int
    came_at: float


class Simulator:
    """A simulator's answers and counts, without its listening socket.

    Args:
        behaviour: what it does.
        loop: whose clock and timers it uses.
    """

    def __init__(self, behaviour: Behaviour, loop: asyncio.AbstractEventLoop) -> None:
        self._behaviour = behaviour
        self._loop = loop
        self._dice = Dice(behaviour)
        self._ledger = Ledger()
        self._slots: Slots[_Ticket | _Visitor] = Slots(int(behaviour.slots[0][1]), self._start)
        self._cache = PrefixCache(behaviour.prefix_cache)
        self._visitors = 0
        self._visitors_started = 0
        self._visiting = 0
        self._random = random.Random(behaviour.seed)  # noqa: S311 — it draws arrivals, not secrets
        self._timers: list[asyncio.TimerHandle] = []
        self._next_visit: asyncio.TimerHandle | None = None
        self._since = loop.time()
        self._begin_schedules()
        self._retry_after = b"" if behaviour.retry_after is None else b"Retry-After: %d\r\n" % behaviour.retry_after

    def stats(self) -> Stats:
        """What happened since the start or the last reset."""
        slots = self._slots
        queued = self._visitors - self._visitors_started
        return self._ledger.snapshot(
            in_flight=slots.in_flight - self._visiting, waiting=slots.waiting - queued, peak=slots.peak
        )

    def reset(self) -> None:
        """Forget all counts and attempts, empty the prefix cache, and start the clock of the outages again.

        What is under way goes on.
        """
        now = self.stats()
        self._ledger = Ledger(received=now.in_flight + now.waiting)
        self._cache = PrefixCache(self._behaviour.prefix_cache)
        self._slots.peak = self._slots.in_flight
        self._since = self._loop.time()
        self.close()
        self._begin_schedules()

    def close(self) -> None:
        """Let nothing more happen by itself."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self._next_visit is not None:
            self._next_visit.cancel()
            self._next_visit = None

    # What happens by itself, as time passes.

    def _begin_schedules(self) -> None:
        behaviour = self._behaviour
        self._resize(int(behaviour.slots[0][1]))
        for since, slots in behaviour.slots[1:]:
            self._timers.append(self._loop.call_later(since, self._resize, int(slots)))
        ends = [since for since, _ in behaviour.interactive[1:]]
        for (since, rate), end in zip(behaviour.interactive, [*ends, math.inf], strict=False):
            if rate > 0:
                self._timers.append(self._loop.call_later(since, self._next_visitor, rate, self._since + end))

    def _resize(self, slots: int) -> None:
        self._slots.limit = slots
        self._slots.admit()

    def _next_visitor(self, rate: float, until: float) -> None:
        """Requests of others come at random times, one independent of the other."""
        now = self._loop.time()
        if now >= until:
            return
        self._visitors += 1
        self._slots.enter(_Visitor(self._visitors, now))
        self._next_visit = self._loop.call_later(self._random.expovariate(rate), self._next_visitor, rate, until)

    # What connections call.

    def handle(self, exchange: Exchange) -> None:
        """Answer an exchange now, or when its time has come."""
        path = exchange.path
        endpoint = INFERENCE.get(path)
        try:
            methods = _METHODS.get(path)
            if methods is None:
                raise NotFound(f"There is no {path[:200].decode(errors='replace')!r} here; there is {_PATHS}.")
            if exchange.method not in methods:
                raise MethodNotAllowed(f"{path.decode()} answers {' and '.join(methods.values())} only.")
            if endpoint is None:
                self._administer(exchange)
                return
            self._ledger.received += 1
            try:
                self._accept(exchange, endpoint)
            except ApiError as error:
                self._ledger.answer(error.status)
                raise
        except ApiError as error:
            headers = error.headers()
            if isinstance(error, MethodNotAllowed):
                headers["Allow"] = ", ".join(_METHODS[path].values())
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            body = error_body(error.message, error.type, param=error.param, code=error.code)
            exchange.send(error.status, body, headers=lines.encode())

    def refuse(self, exchange: Exchange) -> None:
        """Answer an exchange that HTTP itself forbids."""
        code = phrase(exchange.refusal).lower().replace(" ", "_")
        exchange.send(exchange.refusal, error_body(_REFUSALS[exchange.refusal], "invalid_request_error", code=code))

    def abandon(self, exchange: Exchange) -> None:
        """Free what an exchange holds whose client has gone."""
        ticket = exchange.ticket
        if not isinstance(ticket, _Ticket):
            return
        self._ledger.aborted += 1
        if self._slots.withdraw(ticket):
            return
        if ticket.timer is not None:
            ticket.timer.cancel()
        self._slots.leave()

    # The gate.

    def _check_key(self, exchange: Exchange) -> None:
        key = self._behaviour.api_key
        if key is None:
            return
        scheme, _, given = exchange.authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
            raise Unauthorized("Incorrect API key provided.")

    def _in_outage(self) -> bool:
        behaviour = self._behaviour
        return bool(behaviour.outages) and behaviour.in_outage(self._loop.time() - self._since)

    def _administer(self, exchange: Exchange) -> None:
        """Answer what is not inference; none of it is counted."""
        path = exchange.path
        if path == STATS:
            exchange.send(200, msgspec.json.encode(self.stats()))
        elif path == RESET:
            self.reset()
            exchange.send(200, msgspec.json.encode(self.stats()))
        elif self._in_outage():
            self._send_fault(exchange, 503)
        elif path == METRICS:
            exchange.send(200, self._engine_metrics(), PROMETHEUS)
        elif path == HEALTH:
            exchange.send(200, b'{"status":"ok"}')
        else:
            self._check_key(exchange)
            exchange.send(200, models_body(self._behaviour.models))

    def _engine_metrics(self) -> bytes:
        """How busy it is, as vLLM says it."""
        slots = self._slots
        use = min(1.0, slots.in_flight / slots.limit) if slots.limit else 0.0
        model = self._behaviour.models[0] if self._behaviour.models else "simulated"
        escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        labels = f'{{model_name="{escaped}"}}'
        return "".join(
            f"# TYPE vllm:{name} gauge\nvllm:{name}{labels} {value}\n"
            for name, value in (
                ("num_requests_running", float(slots.in_flight)),
                ("num_requests_waiting", float(slots.waiting)),
                ("kv_cache_usage_perc", 0.9 * use),
            )
        ).encode()

    # The way of a request.

    def _accept(self, exchange: Exchange, endpoint: Endpoint) -> None:
        behaviour = self._behaviour
        if self._in_outage():
            self._ledger.answer(503)
            self._send_fault(exchange, 503)
            return
        self._check_key(exchange)
        request, prompt = read_request(exchange.body, endpoint)
        exchange.body = b""
        if behaviour.models and request.model not in behaviour.models:
            raise NotFound(
                f"The model {request.model[:200]!r} does not exist; there are {', '.join(behaviour.models)}.",
                param="model",
                code="model_not_found",
            )
        try:
            directive = read_directive(prompt)
        except ValueError as error:
            raise BadRequest(f"{error}.", param=endpoint.prompt_field, code="invalid_directive") from None
        fingerprint = request.fingerprint
        self._ledger.arrival(fingerprint)
        if behaviour.max_queue is not None and self._slots.full and self._slots.waiting >= behaviour.max_queue:
            self._ledger.answer(429)
            self._send_fault(exchange, 429)
            return
        attempt = self._ledger.attempt(fingerprint)
        tokens = self._dice.tokens(fingerprint)
        made = 0 if endpoint is Endpoint.EMBEDDINGS else allowed(tokens, request.limit)[0]
        outcome = self._dice.outcome(fingerprint, attempt, made)
        if directive is not None:
            outcome = directive.override(outcome, attempt)
        exchange.ticket = ticket = _Ticket(
            exchange, request, attempt, tokens, outcome, prompt if behaviour.prefix_cache else b""
        )
        self._slots.enter(ticket)

    def _slowed(self, delay: float) -> float:
        """The time that a request takes which begins now."""
        if self._behaviour.slowdown and self._slots.limit:
            return delay * (1.0 + self._behaviour.slowdown * min(1.0, self._slots.in_flight / self._slots.limit))
        return delay

    def _start(self, ticket: _Ticket | _Visitor) -> None:
        """The ticket has its slot."""
        if isinstance(ticket, _Visitor):
            self._ledger.interactive_start(self._loop.time() - ticket.came_at)
            tokens = self._dice.tokens(ticket.number)
            delay = self._slowed(self._dice.outcome(ticket.number, 1, tokens).delay)
            self._visitors_started += 1
            self._visiting += 1
            self._loop.call_later(delay, self._visitor_leaves)
            return
        outcome, request = ticket.outcome, ticket.request
        if request.endpoint is not Endpoint.EMBEDDINGS:
            ticket.cached = min(self._cache.use(request.model, ticket.prompt), request.prompt_tokens)
        ticket.prompt = b""
        self._ledger.prompt_tokens += request.prompt_tokens
        self._ledger.cached_tokens += ticket.cached
        delay = outcome.delay + (request.prompt_tokens - ticket.cached) * self._behaviour.uncached_latency
        if outcome.fault is Fault.STALL:
            self._ledger.stalled += 1
        elif delay > 0:
            ticket.timer = self._loop.call_later(self._slowed(delay), self._finish, ticket)
        else:
            self._finish(ticket)

    def _visitor_leaves(self) -> None:
        self._visiting -= 1
        self._slots.leave()

    def _finish(self, ticket: _Ticket) -> None:
        """The ticket's time is over."""
        ledger, exchange, fault, status = self._ledger, ticket.exchange, ticket.outcome.fault, ticket.outcome.status
        # The two know each other; parted here, both are freed at once rather than by the garbage collector.
        exchange.ticket = None
        # Before the answer: the next request on the same connection may be handed on while the answer is written.
        self._slots.leave()
        if fault is Fault.RESET:
            ledger.reset += 1
            exchange.reset()
            return
        name = b"x-request-id: sim-%016x-%d\r\n" % (ticket.request.fingerprint, ticket.attempt)
        if fault is Fault.STATUS:
            ledger.answer(status)
            self._send_fault(exchange, status, name)
            return
        if fault is Fault.HTML:
            ledger.answer(status)
            exchange.send(status, html_body(status, phrase(status)), HTML, name)
            return
        body, billed = answer_body(
            ticket.request, ticket.tokens, ticket.attempt, int(time.time()), self._behaviour, cached=ticket.cached
        )
        if fault is Fault.TRUNCATE:
            ledger.truncated += 1
            exchange.truncate(status, body)
            return
        ledger.answer(status)
        if fault is Fault.MALFORMED:
            ledger.malformed += 1
            body = body[: len(body) * 2 // 3]
        else:
            ledger.payment(ticket.request.fingerprint, billed)
        exchange.send(status, body, JSON, name)

    def _send_fault(self, exchange: Exchange, status: int, headers: bytes = b"") -> None:
        if status in (429, 503):
            headers += self._retry_after
        exchange.send(status, fault_body(status), headers=headers)
