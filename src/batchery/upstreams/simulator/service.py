"""What the simulator answers: the paths it serves, the gate before them, and each request's way through its slot.

It connects the pure parts to time and to connections. It must never decide by itself what ought to repeat from run to
run: that is for `outcomes` to decide.
"""

from __future__ import annotations

import asyncio
import hmac
import time

import msgspec

from batchery.upstreams.simulator.answers import allowed, answer_body, error_body, fault_body, html_body, models_body
from batchery.upstreams.simulator.behaviour import Behaviour
from batchery.upstreams.simulator.ledger import Ledger, Stats
from batchery.upstreams.simulator.outcomes import Dice, Fault, Outcome, read_directive
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
STATS = b"/simulator/stats"
RESET = b"/simulator/reset"

_READING = {b"GET": "GET", b"HEAD": "HEAD"}
_POSTING = {b"POST": "POST"}
_METHODS = {
    **dict.fromkeys((*INFERENCE, RESET), _POSTING),
    **dict.fromkeys((*MODELS, HEALTH, STATS), _READING),
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
    timer: asyncio.TimerHandle | None = None


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
        self._slots: Slots[_Ticket] = Slots(behaviour.concurrency, self._start)
        self._since = loop.time()
        self._retry_after = b"" if behaviour.retry_after is None else b"Retry-After: %d\r\n" % behaviour.retry_after

    def stats(self) -> Stats:
        """What happened since the start or the last reset."""
        slots = self._slots
        return self._ledger.snapshot(in_flight=slots.in_flight, waiting=slots.waiting, peak=slots.peak)

    def reset(self) -> None:
        """Forget all counts and attempts, and start the clock of the outages again; what is under way goes on."""
        self._ledger = Ledger(received=self._slots.in_flight + self._slots.waiting)
        self._slots.peak = self._slots.in_flight
        self._since = self._loop.time()

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
        elif path == HEALTH:
            exchange.send(200, b'{"status":"ok"}')
        else:
            self._check_key(exchange)
            exchange.send(200, models_body(self._behaviour.models))

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
        exchange.ticket = ticket = _Ticket(exchange, request, attempt, tokens, outcome)
        self._slots.enter(ticket)

    def _start(self, ticket: _Ticket) -> None:
        """The ticket has its slot."""
        outcome = ticket.outcome
        if outcome.fault is Fault.STALL:
            self._ledger.stalled += 1
        elif outcome.delay > 0:
            ticket.timer = self._loop.call_later(outcome.delay, self._finish, ticket)
        else:
            self._finish(ticket)

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
        body, billed = answer_body(ticket.request, ticket.tokens, ticket.attempt, int(time.time()), self._behaviour)
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
