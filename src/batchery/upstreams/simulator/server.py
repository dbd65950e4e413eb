"""The simulator's listening socket: started and stopped, in a process of its own or inside a test.

It must never outlive what started it: leaving `running_simulator` closes the socket and every connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from batchery.upstreams.simulator.behaviour import Behaviour
from batchery.upstreams.simulator.ledger import Stats
from batchery.upstreams.simulator.protocol import Connection
from batchery.upstreams.simulator.service import Simulator

BACKLOG = 4096


class RunningSimulator:
    """A simulator that listens.

    Args:
        url: where, without a path; as a client's base URL it serves with and without `/v1`.
        simulator: what answers.
    """

    def __init__(self, url: str, simulator: Simulator) -> None:
        self.url = url
        self._simulator = simulator

    def stats(self) -> Stats:
        """What happened since the start or the last reset."""
        return self._simulator.stats()

    def reset(self) -> None:
        """Forget all counts and attempts, and start the clock of the outages again."""
        self._simulator.reset()


@asynccontextmanager
async def running_simulator(
    behaviour: Behaviour | None = None, *, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[RunningSimulator]:
    """A simulator on the running event loop, for as long as the context lasts.

    On leaving, requests without an answer are cut off, and counted as aborted.

    Args:
        behaviour: what it does. None: answers at once, and nothing goes wrong.
        host: the address to listen on.
        port: 0 takes any free one.

    Raises:
        OSError: the address cannot be listened on.
    """
    loop = asyncio.get_running_loop()
    simulator = Simulator(behaviour or Behaviour(), loop)
    connections: set[Connection] = set()
    server = await loop.create_server(lambda: Connection(simulator, connections), host, port, backlog=BACKLOG)
    bound = server.sockets[0].getsockname()[1]
    try:
        yield RunningSimulator(f"http://{f'[{host}]' if ':' in host else host}:{bound}", simulator)
    finally:
        simulator.close()
        server.close()
        while connections:
            for connection in list(connections):
                connection.close()
            # Connections leave the set in a callback of the loop, a step after they were closed.
            await asyncio.sleep(0)
        await server.wait_closed()
