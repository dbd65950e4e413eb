"""An OpenAI-compatible inference server that only pretends: for tests, demos and benchmarks.

It answers from the prompt, fails on demand and repeats itself exactly, so that a batch system can be measured and
broken without a model. It must never be taken for one: its answers, its headers and its models say what it is.
"""

from batchery.upstreams.simulator.answers import expected_text, expected_vectors, fingerprint
from batchery.upstreams.simulator.behaviour import Behaviour, Latency, LogNormal, Schedule, Uniform
from batchery.upstreams.simulator.ledger import Stats
from batchery.upstreams.simulator.server import RunningSimulator, running_simulator

__all__ = [
    "Behaviour",
    "Latency",
    "LogNormal",
    "RunningSimulator",
    "Schedule",
    "Stats",
    "Uniform",
    "expected_text",
    "expected_vectors",
    "fingerprint",
    "running_simulator",
]
