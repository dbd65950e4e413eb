"""How near the limit that finds itself comes to the best fixed one, while the upstream's capacity changes under way.

    python -m benchmarks.limits [--phase 30] [--latency lognormal:300ms] [--upstream-metrics auto]

A simulator has 256 slots, then 64, then 256 again; it queues, refuses with 429, or answers more slowly the more it has.
A server with no `--max-in-flight` runs one batch through all of that. Beside it, for each capacity and on the same
machine, runs a server whose `--max-in-flight` is that capacity, which is the best fixed limit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.processes import call, create, make_file, start, upload

SLOTS = (256, 64, 256)
REQUESTS = 100_000
"""More than there is time for."""

SETTLED = 5.0
"""Seconds after a change that the last column leaves out."""

UPSTREAMS: dict[str, list[str]] = {
    "queues": [],
    "refuses (429)": ["--max-queue", "0", "--retry-after", "none"],
    "slows down with load": ["--slowdown", "1"],
}


def watch(simulator: str, moments: list[float]) -> tuple[list[int], int, int]:
    """Good answers so far at some moments from now, and at the end all answers and those that were refused."""
    started, counts = time.monotonic(), []
    for moment in moments:
        time.sleep(max(0.0, started + moment - time.monotonic()))
        stats = call(f"{simulator}/simulator/stats")
        counts.append(stats["by_status"].get("200", 0))
    return counts, stats["answered"], stats["by_status"].get("429", 0)


def run(
    folder: Path, name: str, simulate: list[str], serve: list[str], moments: list[float]
) -> tuple[list[int], int, int]:
    """Run a batch against a simulator, and watch it."""
    where = folder / name
    where.mkdir()
    simulator, upstream = start(["simulate", "--port", "0", *simulate], where / "simulator.log")
    server, url = start(
        [
            *("serve", "--port", "0", "--data-dir", str(where / "data"), "--upstream", upstream),
            *("--max-requests", "1000000", "--log-level", "warning", *serve),
        ],
        where / "server.log",
    )
    try:
        file, _ = upload(url, folder / "input.jsonl")
        call(f"{upstream}/simulator/reset", "POST")
        create(url, file)
        return watch(upstream, moments)
    finally:
        for process in (server, simulator):
            process.terminate()
            process.wait(30)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", type=float, default=30.0, help="seconds of each capacity")
    parser.add_argument("--latency", default="lognormal:300ms", help="of the simulator")
    parser.add_argument("--upstream-metrics", choices=("auto", "off"), default="auto", help="as of batchery serve")
    parser.add_argument("--only", choices=sorted(UPSTREAMS), help="one of the upstreams")
    options = parser.parse_args()
    phase = options.phase
    simulate = ["--latency", options.latency]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_file(folder / "input.jsonl", REQUESTS, 300, "limits")
        print(
            f"{phase:g} s each of {', '.join(map(str, SLOTS))} slots, latency {options.latency}, upstream metrics "
            f"{options.upstream_metrics}; shares of the best fixed limit's answers, and of all calls\n"
        )
        print(f"| upstream | all the time | from {SETTLED:g} s after each change | wasted |\n|---|---|---|---|")
        for index, (upstream, behaviour) in enumerate(UPSTREAMS.items()):
            if options.only not in (None, upstream):
                continue
            best = {}
            for slots in sorted(set(SLOTS)):
                counts, _, _ = run(
                    folder,
                    f"{index}-{slots}",
                    ["--concurrency", str(slots), *simulate, *behaviour],
                    ["--max-in-flight", str(slots)],
                    [3.0, 13.0],
                )
                best[slots] = (counts[1] - counts[0]) / 10.0
            schedule = ",".join(f"{slots}@{phase * turn:g}s" for turn, slots in enumerate(SLOTS))
            moments = [moment for turn in range(3) for moment in (turn * phase + SETTLED, (turn + 1) * phase)]
            counts, answered, refused = run(
                folder,
                f"{index}-adaptive",
                ["--concurrency", schedule, *simulate, *behaviour],
                ["--upstream-metrics", options.upstream_metrics],
                moments,
            )
            total = counts[-1] / (phase * sum(best[slots] for slots in SLOTS))
            later = [
                (counts[2 * turn + 1] - counts[2 * turn]) / (phase - SETTLED) / best[slots]
                for turn, slots in enumerate(SLOTS)
            ]
            shares = ", ".join(f"{share:.2f}" for share in later)
            print(f"| {upstream} | {total:.2f} | {shares} | {100 * refused / max(1, answered):.2f} % |", flush=True)


if __name__ == "__main__":
    main()
