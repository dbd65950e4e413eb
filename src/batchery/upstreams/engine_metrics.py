"""How busy an inference engine is, from its own Prometheus metrics: who waits there, and how full its cache is.

The names are those of vLLM (`num_requests_waiting`, `num_requests_running`, `kv_cache_usage_perc`, which was
`gpu_cache_usage_perc` in older ones), SGLang (`num_queue_reqs`, `num_running_reqs`, `token_usage`) and llama.cpp's
server (`requests_deferred`, `requests_processing`, and in older ones `kv_cache_usage_ratio`). A server without them has
no load to tell. Pure.
"""

from __future__ import annotations

import math

from prometheus_client.parser import text_string_to_metric_families

from batchery.upstreams.base import Load

WAITING = frozenset(("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred"))
RUNNING = frozenset(("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing"))
CACHE = frozenset(
    (
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "sglang:token_usage",
        "llamacpp:kv_cache_usage_ratio",
    )
)
_KNOWN = tuple(sorted(WAITING | RUNNING | CACHE))


def read_load(text: str) -> Load | None:
    """The load in an engine's metrics; None where they are of no engine that is known.

    Args:
        text: in Prometheus' text format. Lines of other metrics are not looked at.
    """
    lines = [line for line in text.splitlines() if line.startswith(_KNOWN)]
    waiting = running = cache = None
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                value = sample.value
                if not math.isfinite(value):
                    continue
                if sample.name in WAITING:
                    waiting = (waiting or 0.0) + value
                elif sample.name in RUNNING:
                    running = (running or 0.0) + value
                elif sample.name in CACHE:
                    cache = max(cache or 0.0, value)
    except (ValueError, IndexError, KeyError):  # the parser's, for text that is none
        return None
    if waiting is None:
        return None
    return Load(max(0, round(waiting)), None if running is None else max(0, round(running)), cache)
