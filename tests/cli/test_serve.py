"""`batchery serve` as a command: its settings, its refusals, and how it comes to an end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import openai
import psutil
import pytest

from batchery.cli.options import read_settings
from batchery.cli.serve import _environment
from batchery.wire.prices import ModelPrices, Price, price_of
from tests.processes import Process, serve, server, simulator, wait_for
from tests.requests import chat_line

NOWHERE = "http://127.0.0.1:9"


def refused(*options: str, **environment: str) -> str:
    """What `batchery serve` says when it does not start; it must be one line, and the exit code that of wrong usage."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("BATCHERY_")}
    done = subprocess.run(
        [sys.executable, "-m", "batchery", "serve", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env=plain | environment,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "batchery.toml").write_text(
        'upstream = "http://file"\nport = 1\nmax_in_flight = 1\ncompletion_windows = "1h"\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHERY_PORT", "2")
    monkeypatch.setenv("BATCHERY_MAX_IN_FLIGHT", "2")
    settings = read_settings(None, max_in_flight=["3"])
    (upstream,) = settings.upstreams
    assert (upstream.url, settings.port, upstream.max_in_flight) == ("http://file", 2, 3)
    assert settings.windows == ("1h",)
    assert settings.cancel_grace == 10.0


def test_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batchery.toml").write_text("this is no TOML")
    other = tmp_path / "other.toml"
    other.write_text('upstream = "http://other"\n')
    assert read_settings(other).upstream == ("http://other",)


def test_several_upstreams_each_with_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batchery.toml").write_text(
        'upstream = ["http://one", "http://two"]\nmax_in_flight = [64, "auto"]\nyield_to_interactive = 0.25\n'
        'upstream_metrics = ["off", "http://two:9/metrics"]\n'
    )
    monkeypatch.setenv("BATCHERY_REQUESTS_PER_MINUTE", "none,500")
    one, two = read_settings(None, upstream_key_env=["none", "TWO"], tokens_per_minute=["9"]).upstreams
    assert (one.url, one.key_env, one.metrics) == ("http://one", None, "off")
    assert (two.url, two.key_env, two.metrics) == ("http://two", "TWO", "http://two:9/metrics")
    assert (one.max_in_flight, one.requests_per_minute, one.tokens_per_minute) == (64, None, 9)
    assert (two.max_in_flight, two.requests_per_minute, two.tokens_per_minute) == (None, 500, 9)
    assert (one.yield_share, two.yield_share) == (0.25, 0.25)
    monkeypatch.delenv("BATCHERY_REQUESTS_PER_MINUTE")
    monkeypatch.setenv("BATCHERY_UPSTREAM", "http://a http://b,http://c")
    one, *others = read_settings(None, max_in_flight=["8", "auto", "9"], upstream_metrics=["auto"]).upstreams
    assert [one.url, *(other.url for other in others)] == ["http://a", "http://b", "http://c"]
    assert [other.max_in_flight for other in others] == [None, 9]


def test_the_worker_is_told_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through its environment, whatever the settings came from."""
    monkeypatch.chdir(tmp_path)
    settings = read_settings(
        None,
        upstream=["http://a", "http://b/v1"],
        upstream_key_env=["none", "B"],
        max_in_flight=["7", "auto"],
        tokens_per_minute=["70"],
        yield_to_interactive=["0.1", "1"],
    )
    environment = _environment(settings)
    for name, value in environment.items():
        if name.startswith("BATCHERY_"):
            monkeypatch.setenv(name, value)
    assert read_settings(None).upstreams == settings.upstreams


def test_each_request_goes_to_the_upstream_with_its_model(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        simulator(tmp_path / "one", "--models", "a,both") as one,
        simulator(tmp_path / "two", "--models", "b,both") as two,
        server(tmp_path, one.url, "--upstream", two.url, "--max-in-flight", "8") as running,
    ):
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
        assert sorted(model.id for model in client.models.list()) == ["a", "b", "both"]
        data = b"".join(
            chat_line(f"{model}{i}", f"{i}", model=model) for i in range(50) for model in ("a", "b", "both")
        )
        file = client.files.create(file=("input.jsonl", data), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", what="the end of the batch")
        counts = client.batches.retrieve(batch.id).request_counts
        assert counts is not None
        assert (counts.completed, counts.failed) == (150, 0)
        received = [upstream.get("/simulator/stats")["received"] for upstream in (one, two)]
        assert min(received) > 50
        assert sum(received) == 150


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--upstream is needed"),
        (("--upstream", ""), "--upstream: name an inference server"),
        (("--upstream", NOWHERE, "--upstream", NOWHERE + "/v1/"), "named twice"),
        (
            ("--upstream", NOWHERE, "--upstream", NOWHERE + "1", *(3 * ("--max-in-flight", "1"))),
            "--max-in-flight: there are 3 of it and 2 of --upstream",
        ),
        (("--upstream", NOWHERE, "--max-in-flight", "many"), "'many' is not a whole number from 1 to 65536, or auto"),
        (("--upstream", NOWHERE, "--yield-to-interactive", "1.5"), "'1.5' is not a number from 0 to 1"),
        (("--upstream", "ftp://x"), "is not an upstream URL"),
        (("--upstream", "http://user:secret@x"), "--upstream-key-env"),
        (("--upstream", NOWHERE, "--upstream-key-env", "NOT_SET"), "NOT_SET"),
        (("--upstream", NOWHERE, "--host", "0.0.0.0"), "batchery keys create --data-dir "),
        (("--upstream", NOWHERE, "--port", "70000"), "--port"),
        (("--upstream", NOWHERE, "--completion-windows", "soon"), "24h"),
        (("--upstream", NOWHERE, "--max-in-flight", "0"), "--max-in-flight"),
        (("--upstream", NOWHERE, "--database", "mysql://x"), "postgresql"),
        (("--upstream", NOWHERE, "--log-level", "loud"), "--log-level"),
        (("--upstream", NOWHERE, "--config", "nowhere.toml"), "nowhere.toml"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    message = refused("--data-dir", str(tmp_path / "data"), *options)
    assert said in message
    assert "secret" not in message


def test_a_setting_in_the_environment_that_is_wrong() -> None:
    assert "--port" in refused("--upstream", NOWHERE, BATCHERY_PORT="http")


def test_prices_come_from_a_table_or_from_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batchery.toml").write_text(
        '[prices."org/m"]\ninput = 1\noutput = 2.5\n[prices.n.1h]\ninput=3\noutput=4\n'
    )
    prices = read_settings(None, upstream=NOWHERE).price_list
    assert price_of(prices, "org/m", "24h") == Price(1, 2.5)
    assert price_of(prices, "n", "1h") == Price(3, 4)
    monkeypatch.setenv("BATCHERY_PRICES", '{"m": {"input": 5, "output": 6}}')
    settings = read_settings(None, upstream=NOWHERE)
    assert settings.price_list == {"m": ModelPrices(Price(5, 6), {})}
    monkeypatch.setenv("BATCHERY_PRICES", _environment(settings)["BATCHERY_PRICES"])  # as the worker gets it
    assert read_settings(None, upstream=NOWHERE).price_list == settings.price_list


@pytest.mark.parametrize(
    ("prices", "said"),
    [
        ('{"m": {"input": -1, "output": 0}}', 'batchery: prices."m".input must be a number of US dollars'),
        ('{"m": {"input": 1e400, "output": 0}}', "batchery: prices is not valid JSON: Number out of range"),
        ('{"m": {"input": 1e10, "output": 0}}', "from 0 to 1000000000, not 10000000000.0"),
        ('{"m": {"input": NaN, "output": 0}}', "prices is not valid JSON"),
        ('{"m": {}, "m": {}}', "stands twice"),
        ("[]", "prices must be a table of models"),
        ("", "prices is not valid JSON"),
        ("\udcff", "prices is not valid JSON"),  # an environment that is not UTF-8
    ],
)
def test_prices_that_cannot_be(prices: str, said: str) -> None:
    assert said in refused("--upstream", NOWHERE, BATCHERY_PRICES=prices)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused("--upstream", NOWHERE, "--port", str(port), "--data-dir", str(tmp_path))
    assert f"127.0.0.1:{port}" in message


def test_of_servers_that_are_started_together_one_gets_the_port(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "batchery", "serve", "--upstream", NOWHERE, "--port", port, "--data-dir"]
    started = [
        subprocess.Popen(
            [*command, str(tmp_path / str(number))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for number in range(3)
    ]
    said = [process.stdout.readline() for process in started if process.stdout is not None]
    assert sorted(said) == ["", "", f"batchery listening on http://127.0.0.1:{port}\n"]
    for process, line in zip(started, said, strict=True):
        if line:
            process.terminate()
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == (0 if line else 1)
        assert line or f"127.0.0.1:{port}" in stderr


def test_a_folder_that_is_in_use(tmp_path: Path) -> None:
    running = serve(tmp_path, NOWHERE)
    try:
        message = refused("--upstream", NOWHERE, "--port", "0", "--data-dir", str(tmp_path / "data"))
        assert f"process {running.pid}" in message
        assert running.get("/healthz")
    finally:
        assert running.stop() == 0


def test_it_stops_cleanly_and_takes_its_worker_along(tmp_path: Path) -> None:
    running = serve(tmp_path, NOWHERE)
    children = running.children()
    assert len(children) == 1
    assert running.get("/readyz")
    assert running.stop() == 0
    assert not any(child.is_running() for child in children)
    assert "Traceback" not in running.log.read_text()


def test_a_worker_that_dies_is_started_again(tmp_path: Path) -> None:
    running = serve(tmp_path, NOWHERE)
    try:
        (first,) = running.children()
        first.kill()
        wait_for(lambda: [child for child in running.children() if child.pid != first.pid], 15, "another worker")
    finally:
        assert running.stop() == 0


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """As `batchery run` starts it: the end of its standard input is its own."""
    command = ["serve", "--exit-with-stdin", "--port", "0", "--data-dir", str(tmp_path / "data")]
    process = subprocess.Popen(
        [sys.executable, "-m", "batchery", *command, "--upstream", NOWHERE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert b"listening" in process.stdout.readline()
    children = psutil.Process(process.pid).children()
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()
    assert psutil.wait_procs(children, 5)[1] == []


def test_the_folder_is_nobody_else_s_business(tmp_path: Path) -> None:
    running: Process = serve(tmp_path, NOWHERE)
    assert (tmp_path / "data").stat().st_mode & 0o077 == 0
    assert running.stop() == 0
