"""How good `estimated_completion_at` is: the largest error of any look after the first tenth of a run, of its length.

python -m benchmarks.estimates [--seconds 30]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from benchmarks.processes import ENDED, call, create, make_file, running, upload

SLOTS = 64
MEANS = {"50ms": 0.05, "lognormal:200ms": 0.2266}
"""Mean seconds of each latency; a log-normal one has sigma 0.5."""


def worst(url: str, path: Path, requests: int, second: int) -> list[float]:
    """Run a batch, and perhaps a second one that comes after a third of it; the largest error of each, of its length.

    Args:
        requests: of the first.
        second: of the second; 0 for none.
    """
    make_file(path, requests, 200, f"first {time.time()}")
    batches = [(create(url, upload(url, path)[0])["id"], time.time())]
    looks: dict[str, list[tuple[float, float]]] = {batches[0][0]: []}
    lengths: list[float] = []
    while len(lengths) < len(batches):
        for id, began in batches[len(lengths) :]:
            batch = call(f"{url}/v1/batches/{id}")
            if batch["status"] in ENDED:
                lengths.append(time.time() - began)
            elif batch["estimated_completion_at"] is not None:
                looks[id].append((time.time(), batch["estimated_completion_at"]))
            if second and len(batches) == 1 and batch["request_counts"]["completed"] > requests / 3:
                make_file(path, second, 200, f"second {time.time()}")
                batches.append((create(url, upload(url, path)[0])["id"], time.time()))
                looks[batches[1][0]] = []
        time.sleep(0.1)
    errors = []
    for (id, began), length in zip(batches, lengths, strict=True):
        after = [abs(told - began - length) for when, told in looks[id] if when >= began + length / 10]
        errors.append(max(after) / length)
    return errors


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="that the first batch is to take")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; whole seconds are told\n")
    print("| largest error after the first tenth ÷ length of the run | reach | measured |\n|---|---|---|", flush=True)
    for latency, mean in MEANS.items():
        requests = round(options.seconds * SLOTS / mean)
        for second in (0, requests // 2):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                simulator = ["simulate", "--port", "0", "--latency", latency, "--concurrency", str(SLOTS)]
                with running(simulator, folder / "log") as (_, upstream):
                    server = ["serve", "--port", "0", "--data-dir", str(folder / "data"), "--upstream", upstream]
                    with running([*server, "--max-in-flight", str(SLOTS)], folder / "log") as (_, url):
                        errors = worst(url, folder / "input.jsonl", requests, second)
            told = ", ".join(f"{error:.2f}" for error in errors)
            print(
                f"| {latency}, {SLOTS} slots{', a second batch comes' if second else ''} | ≤ 0.15 | {told} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
