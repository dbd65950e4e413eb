"""How long others wait at an inference server that batches share, by how far batch work yields to them.

    python -m benchmarks.interactive [--seconds 20] [--slots 64] [--latency lognormal:300ms] [--load 0.3]

A simulator with so many slots gets requests of others at random times, a share `--load` of what it can do, while a
batch that has no end runs on the rest. Each row is a server with another `--yield-to-interactive`, and the first is the
simulator without any batch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from batchery.upstreams.simulator.options import parse_latency
from benchmarks.processes import call, create, make_file, running, upload

REQUESTS = 60_000
"""More than there is time for."""

SETTLED = 8.0
"""Seconds from the batch's start that do not count."""

MEAN_OF_LOGNORMAL = 1.133
"""Of sigma 0.5, relative to the median."""


def measure(folder: Path, slots: int, latency: str, rate: float, share: float | None, seconds: float) -> list[float]:
    """Others' mean and longest wait, and answers a second to them and to the batch; no batch where share is None."""
    folder.mkdir()
    simulate = ["simulate", "--port", "0", "--latency", latency, "--concurrency", str(slots)]
    with running([*simulate, "--interactive", f"{rate:g}"], folder / "simulator.log") as (_, upstream):
        if share is None:
            return _watch(upstream, seconds)
        serve = ["serve", "--port", "0", "--data-dir", str(folder / "data"), "--upstream", upstream]
        more = ["--max-requests", "1000000", "--log-level", "warning", "--yield-to-interactive", f"{share:g}"]
        with running([*serve, *more], folder / "server.log") as (_, url):
            file, _ = upload(url, folder.parent / "input.jsonl")
            create(url, file)
            time.sleep(SETTLED)
            return _watch(upstream, seconds)


def _watch(upstream: str, seconds: float) -> list[float]:
    call(f"{upstream}/simulator/reset", "POST")
    began = time.monotonic()
    time.sleep(seconds)
    stats, passed = call(f"{upstream}/simulator/stats"), time.monotonic() - began
    return [
        stats["interactive_wait"],
        stats["interactive_longest_wait"],
        stats["interactive"] / passed,
        stats["answered"] / passed,
    ]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--latency", default="lognormal:300ms")
    parser.add_argument("--load", type=float, default=0.3, help="others' share of what the server can do")
    options = parser.parse_args()
    latency = parse_latency(options.latency)
    mean = latency if isinstance(latency, float) else getattr(latency, "median", 0.3) * MEAN_OF_LOGNORMAL
    capacity = options.slots / mean
    rate = options.load * capacity
    print(f"{options.slots} slots, latency {options.latency}, so {capacity:.0f} answers/s; others ask for {rate:.0f}\n")
    print("| `--yield-to-interactive` | others wait, mean | longest | others' answers/s | the batch's | slots in use |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_file(folder / "input.jsonl", REQUESTS, 300, "interactive")
        for share in (None, 0.0, 0.5, 1.0):
            found = measure(folder / str(share), options.slots, options.latency, rate, share, options.seconds)
            wait, longest, theirs, ours = found
            label = "no batch" if share is None else f"{share:g}"
            print(
                f"| {label} | {1e3 * wait:.0f} ms | {1e3 * longest:.0f} ms | {theirs:.0f} | {ours:.0f} "
                f"| {(theirs + ours) / capacity:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
