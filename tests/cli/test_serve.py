"""`batchery serve` as a command: its settings, its refusals, and how it comes to an end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from batchery.cli.options import read_settings
from batchery.cli.serve import _environment
from batchery.wire.prices import ModelPrices, Price, price_of
from tests.processes import Process, serve, wait_for

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
    settings = read_settings(None, max_in_flight=3)
    assert (settings.upstream, settings.port, settings.max_in_flight) == ("http://file", 2, 3)
    assert settings.windows == ("1h",)
    assert settings.cancel_grace == 10.0


def test_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batchery.toml").write_text("this is no TOML")
    other = tmp_path / "other.toml"
    other.write_text('upstream = "http://other"\n')
    assert read_settings(other).upstream == "http://other"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--upstream is needed"),
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
    assert process.wait(20) == 0
    process.stdout.close()
    assert psutil.wait_procs(children, 5)[1] == []


def test_the_folder_is_nobody_else_s_business(tmp_path: Path) -> None:
    running: Process = serve(tmp_path, NOWHERE)
    assert (tmp_path / "data").stat().st_mode & 0o077 == 0
    assert running.stop() == 0
