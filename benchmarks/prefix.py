"""What the upstream's prefix cache finds of a shuffled file, beside the best order, and what the order costs a line.

    python -m benchmarks.prefix [--requests 20000] [--prefixes 50] [--prefix-bytes 2000] [--cache-blocks 512]

The upstream is `batchery simulate` with a prefix cache that holds only some of the prefixes. The best order is the
sorted one, sent by the bare cache model; the file's own order is the one without any planning. The cost is CPU time:
learning the prefixes while the file streams by, and putting the index in order, beside the validation of its lines.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from batchery.engine.planner import cut
from batchery.upstreams.simulator.prefix_cache import PrefixCache
from batchery.upstreams.simulator.requests import Endpoint, read_request
from batchery.wire.lines import Limits, parse_line
from batchery.wire.prefixes import PrefixTree
from batchery.wire.validation import validate
from benchmarks.processes import ENDED, call, create, running, upload

URL = "/v1/chat/completions"
ROUNDS = 15


def make_lines(count: int, prefixes: int, prefix_bytes: int) -> list[bytes]:
    """Requests that share so many prefixes, in no order."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5_000)]
    shared = [" ".join(draw.choices(words, k=prefix_bytes))[:prefix_bytes] for _ in range(prefixes)]
    lines = []
    for i in range(count):
        messages = [
            {"role": "system", "content": shared[i % prefixes]},
            {"role": "user", "content": f"{i}: {' '.join(draw.choices(words, k=20))}?"},
        ]
        request = {"custom_id": str(i), "method": "POST", "url": URL, "body": {"model": "m", "messages": messages}}
        lines.append(json.dumps(request).encode())
    draw.shuffle(lines)
    return lines


def found(lines: list[bytes], blocks: int) -> int:
    """The tokens that a cache finds if the requests come in this order."""
    cache = PrefixCache(blocks)
    bodies = (json.dumps(json.loads(line)["body"]).encode() for line in lines)
    return sum(cache.use("m", read_request(body, Endpoint.CHAT)[1]) for body in bodies)


def each(act: Callable[[], object], count: int) -> float:
    """CPU microseconds a line, the least of some rounds, since others use the machine."""
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        act()
        times.append(time.process_time() - began)
    return 1e6 * min(times) / count


def costs(lines: list[bytes]) -> dict[str, float]:
    """CPU microseconds a line of each step."""
    limits = Limits(requests=len(lines))
    trees: list[PrefixTree] = []

    def learn() -> None:
        tree = PrefixTree()
        for line in lines:
            tree.add(line, URL)
        trees.append(tree)

    requests = array("I", range(len(lines)))
    data = b"\n".join(lines)
    index = validate([data], limits, lambda start, length: data[start : start + length]).index
    return {
        "validate a line": each(lambda: [parse_line(line, 1, limits) for line in lines], len(lines)),
        "learn its prefix": each(learn, len(lines)),
        "put in order": each(lambda: trees[-1].finish().in_order(requests), len(lines)),
        "cut into shards": each(lambda: cut(index), len(lines)),
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--prefixes", type=int, default=50)
    parser.add_argument("--prefix-bytes", type=int, default=2_000)
    parser.add_argument("--cache-blocks", type=int, default=512)
    parser.add_argument("--in-flight", type=int, default=64)
    options = parser.parse_args()
    lines = make_lines(options.requests, options.prefixes, options.prefix_bytes)
    order = sorted(lines, key=lambda line: line.partition(b'"messages"')[2])
    best, own = found(order, options.cache_blocks), found(lines, options.cache_blocks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "input.jsonl"
        path.write_bytes(b"\n".join(lines))
        simulate = ["simulate", "--port", "0", "--latency", "5ms", "--prefix-cache", str(options.cache_blocks)]
        with running(simulate, folder / "simulator.log") as (_, upstream):
            serve = ["serve", "--port", "0", "--data-dir", str(folder / "data"), "--upstream", upstream]
            serve += ["--max-in-flight", str(options.in_flight), "--max-requests", str(max(50_000, options.requests))]
            with running([*serve, "--log-level", "warning"], folder / "server.log") as (_, url):
                file, _ = upload(url, path)
                batch = create(url, file)
                while batch["status"] not in ENDED:
                    time.sleep(0.1)
                    batch = call(f"{url}/v1/batches/{batch['id']}")
                if batch["request_counts"]["completed"] != options.requests:
                    raise SystemExit(f"the batch did not complete: {batch}")
            stats = call(f"{upstream}/simulator/stats")
    tokens = stats["prompt_tokens"]
    print(
        f"{options.requests} requests, {options.prefixes} prefixes of {options.prefix_bytes} bytes, shuffled; ", end=""
    )
    print(f"a cache of {options.cache_blocks} blocks; {options.in_flight} in flight")
    print(f"  hit rate, best order          {best / tokens:8.3f}")
    print(f"  hit rate, the file's order    {own / tokens:8.3f}")
    print(f"  hit rate, batchery            {stats['cached_tokens'] / tokens:8.3f}")
    print(f"  batchery / best order         {stats['cached_tokens'] / best:8.3f}")
    for step, microseconds in costs(lines).items():
        print(f"  {step:28}  {microseconds:8.2f} us of CPU a line")


if __name__ == "__main__":
    main()
