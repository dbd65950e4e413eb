"""`batchery keys` as a command: what it prints, what it keeps, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from batchery.store import api_keys
from tests.databases import create_postgres
from tests.processes import Process, serve, wait_for

NOWHERE = "http://127.0.0.1:9"
KEY = re.compile(r"sk-[A-Za-z0-9_-]{43}")


def keys(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `batchery keys`."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("BATCHERY_")}
    return subprocess.run(
        [sys.executable, "-m", "batchery", "keys", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=plain | environment,
    )


def done(*arguments: str, **environment: str) -> str:
    """What it prints on stdout, when all goes well."""
    ended = keys(*arguments, **environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def create(*arguments: str, **environment: str) -> tuple[str, str]:
    """A new key, and its id."""
    made = json.loads(done("create", "--format", "json", *arguments, **environment))
    return made["key"], made["id"]


def listed(*arguments: str) -> list[dict[str, Any]]:
    """All keys."""
    found: list[dict[str, Any]] = json.loads(done("list", "--format", "json", *arguments))
    return found


def refused(*arguments: str, **environment: str) -> str:
    """What it says, in one line, when it cannot."""
    ended = keys(*arguments, **environment)
    assert (ended.returncode, ended.stdout) == (1, ""), ended
    assert "Traceback" not in ended.stderr
    return ended.stderr


def status(process: Process, key: str | None) -> int:
    """What the server answers to somebody with this key."""
    request = urllib.request.Request(process.url + "/v1/files")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_key_is_made_before_the_server_ever_ran(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "data"
    ended = keys("create", "--data-dir", str(folder))
    assert ended.returncode == 0
    assert KEY.fullmatch(ended.stdout.removesuffix("\n"))
    key = ended.stdout.strip()
    assert key not in ended.stderr
    (row,) = listed("--data-dir", str(folder))
    assert row["id"] in ended.stderr
    assert str(folder) in ended.stderr
    assert row["owner"] == "local"
    assert row["hint"] == key[-4:]
    assert row["revoked_at"] is None
    assert folder.stat().st_mode & 0o777 == 0o700


def test_neither_the_key_nor_the_secret_is_found_afterwards(tmp_path: Path) -> None:
    folder = str(tmp_path / "data")
    made = json.loads(
        done("create", "--format", "json", "--webhook-url", "https://example.com/hook", "--data-dir", folder)
    )
    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", made["webhook_secret"])
    for form in ("table", "json", "jsonl"):
        text = done("list", "--format", form, "--data-dir", folder)
        assert made["id"] in text
        assert made["key"] not in text
        assert made["webhook_secret"] not in text
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "batchery.db")) as connection:
        dump = "\n".join(connection.iterdump())
    assert made["key"] not in dump
    assert made["key"][3:] not in dump
    assert api_keys.digest(made["key"]) in dump


def test_limits_are_set_changed_and_taken_away(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path / "data"))
    _, id = create("--owner", "Zoë & co", "--max-queued-requests", "5", "--max-live-batches", "0", *folder)
    (row,) = listed(*folder)
    assert row["owner"] == "Zoë & co"
    assert (row["max_queued_requests"], row["max_live_batches"], row["max_upload_bytes"]) == (5, 0, None)
    done("update", id, "--max-queued-requests", "none", "--max-upload-bytes", str((1 << 63) - 1), *folder)
    (row,) = listed(*folder)
    assert (row["max_queued_requests"], row["max_live_batches"]) == (None, 0)
    assert row["max_upload_bytes"] == (1 << 63) - 1


def test_the_weight_is_set_and_changed(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path / "data"))
    _, id = create("--weight", "3", *folder)
    assert [row["weight"] for row in listed(*folder)] == [3]
    done("update", id, "--weight", "1000", *folder)
    assert [row["weight"] for row in listed(*folder)] == [1000]
    create(*folder)
    assert [row["weight"] for row in listed(*folder)] == [1000, 1]


def test_the_webhook_and_its_secret(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path / "data"))
    url, other = "https://example.com/a", "https://example.com/b"
    _, id = create(*folder)
    first = done("update", id, "--webhook-url", url, *folder)
    assert first.startswith("whsec_")  # it had none, so one was made
    assert done("update", id, "--webhook-url", other, *folder) == ""
    (row,) = listed(*folder)
    assert row["webhook_url"] == other
    second = done("update", id, "--new-webhook-secret", *folder)
    assert second.startswith("whsec_")
    assert second != first
    assert done("update", id, "--webhook-secret-env", "MINE", *folder, MINE="m" * 20) == ""
    assert done("update", id, "--webhook-url", "none", *folder) == ""
    (row,) = listed(*folder)
    assert row["webhook_url"] is None
    assert "--webhook-url" in refused("update", id, "--new-webhook-secret", *folder)
    made = json.loads(
        done("create", "--format", "json", "--webhook-url", url, "--webhook-secret-env", "S", *folder, S="t" * 20)
    )
    assert "webhook_secret" not in made


def test_the_lists_formats(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path / "data"))
    made = [create("--owner", owner, *folder)[1] for owner in ("ann", "山田", "[red]bob")]
    done("revoke", made[1], *folder)
    lines = done("list", "--format", "jsonl", *folder).splitlines()
    assert [json.loads(line)["id"] for line in lines] == made
    assert [json.loads(line)["revoked_at"] is None for line in lines] == [True, False, True]
    table = done("list", *folder).splitlines()
    assert table[0].split() == [
        "ID",
        "OWNER",
        "KEY",
        "CREATED",
        "REVOKED",
        "REQUESTS",
        "BATCHES",
        "BYTES",
        "WEIGHT",
        "WEBHOOK",
    ]
    assert [line.split()[0] for line in table[1:]] == made
    assert [line.split()[1] for line in table[1:]] == ["ann", "山田", "[red]bob"]


def test_revoking_twice_is_no_mistake(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path / "data"))
    _, id = create(*folder)
    done("revoke", id.removeprefix("key_"), *folder)
    (before,) = listed(*folder)
    assert "since" in keys("revoke", id, *folder).stderr
    assert listed(*folder) == [before]
    assert "revoked" in refused("update", id, "--max-live-batches", "1", *folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--owner", ""), "--owner"),
        (("create", "--owner", "x" * 65), "--owner"),
        (("create", "--owner", " ann"), "--owner"),
        (("create", "--owner", "a\nb"), "--owner"),
        (("create", "--owner", "a\x1b[31m"), "--owner"),
        (("create", "--owner", "\u200b"), "--owner"),
        (("create", "--max-live-batches", "-1"), "--max-live-batches"),
        (("create", "--max-live-batches", str(1 << 63)), "--max-live-batches"),
        (("create", "--max-live-batches", "many"), "--max-live-batches"),
        (("create", "--weight", "0"), "--weight"),
        (("create", "--weight", "1001"), "--weight"),
        (("create", "--webhook-url", "ftp://x"), "--webhook-url"),
        (("create", "--webhook-url", "https://user:hunter2@x"), "--webhook-url"),
        (("create", "--webhook-url", "https://x", "--webhook-secret-env", "NOT_SET"), "NOT_SET"),
        (("create", "--webhook-url", "https://x", "--webhook-secret-env", "SHORT"), "SHORT"),
        (("create", "--webhook-secret-env", "SHORT"), "--webhook-url"),
        (("create", "--data-dir", "/dev/null/x"), "/dev/null/x"),
        (("create", "--database", "mysql://x"), "postgresql"),
        (("create", "--database", "postgresql://u:hunter2@127.0.0.1:9/x"), "database cannot be used"),
        (("create", "--config", "nowhere.toml"), "nowhere.toml"),
        (("list",), "no batchery database"),
        (("list", "--database", "sqlite:////nowhere/x.db"), "no batchery database"),
        (("revoke", "0" * 32), "no batchery database"),
        (("revoke", "key_x"), "key_x"),
        (("revoke", "file-" + "0" * 32), "not the id of a key"),
        (("update", "0" * 32), "nothing to change"),
        (("update", "0" * 32, "--max-live-batches", "-1"), "--max-live-batches"),
        (("update", "0" * 32, "--max-live-batches", str(1 << 63)), "--max-live-batches"),
        (("update", "0" * 32, "--max-live-batches", "٣"), "--max-live-batches"),
        (("update", "0" * 32, "--webhook-url", "none", "--new-webhook-secret"), "--webhook-url none"),
        (("update", "0" * 32, "--webhook-secret-env", "SHORT", "--new-webhook-secret"), "one of them"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    if "--data-dir" not in arguments:
        arguments = (*arguments, "--data-dir", str(folder))
    message = refused(*arguments, SHORT="hunter2")
    assert said in message
    assert "hunter2" not in message
    assert not folder.exists() or list(folder.iterdir()) == []


def test_an_unknown_key(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path / "data"))
    key, _ = create(*folder)
    assert f"key_{'0' * 32}" in refused("revoke", "0" * 32, *folder)
    assert f"key_{'0' * 32}" in refused("update", "0" * 32, "--max-live-batches", "1", *folder)
    for text in (key, "sk-" + "a" * 20):  # the key itself in place of its id is not repeated
        message = refused("revoke", text, *folder)
        assert text not in message
        assert "not the key itself" in message


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "batchery.db").write_bytes(b"this is no database" * 100)
    assert "cannot be used" in refused("list", "--data-dir", str(tmp_path))
    assert "cannot be used" in refused("create", "--data-dir", str(tmp_path))


def test_a_database_that_batchery_has_never_used(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "batchery.db").close()
    (tmp_path / "batchery.db").touch()
    assert "no batchery database" in refused("list", "--data-dir", str(tmp_path))


def test_settings_of_several_upstreams_are_no_obstacle(tmp_path: Path) -> None:
    folder = str(tmp_path / "data")
    assert KEY.fullmatch(done("create", "--data-dir", folder, BATCHERY_MAX_IN_FLIGHT="4,8").strip())


def test_settings_come_from_where_serve_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batchery.toml").write_text('data_dir = "from-file"\nupstream = "http://x"\nport = 1\n')
    create()
    assert (tmp_path / "from-file" / "batchery.db").is_file()
    create(BATCHERY_DATA_DIR="from-environment")
    assert (tmp_path / "from-environment" / "batchery.db").is_file()


async def test_on_postgresql(postgres_server: str, tmp_path: Path) -> None:
    url = (await create_postgres(postgres_server)).replace("+asyncpg", "")
    assert "no batchery database" in refused("list", "--database", url)
    _, id = create("--database", url)
    assert [row["id"] for row in listed("--database", url)] == [id]
    done("revoke", id, "--database", url)
    assert listed("--database", url)[0]["revoked_at"] is not None
    missing = url.replace("/test_", "/missing_")
    assert missing != url
    assert "cannot be used" in refused("create", "--database", missing)


def test_a_running_server_follows(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path / "data"))
    running = serve(tmp_path, NOWHERE)
    try:
        assert status(running, None) == 200
        key, id = create(*folder)
        assert status(running, key) == 200  # at once
        wait_for(lambda: status(running, None) == 401, 5, "the server's being closed")
        other, _ = create("--owner", "other", *folder)
        assert status(running, other) == 200
        done("revoke", id, *folder)
        wait_for(lambda: status(running, key) == 401, 5, "the key's being refused")
        assert status(running, other) == 200
        assert status(running, None) == 401
    finally:
        assert running.stop() == 0
    assert key not in running.log.read_text()


def test_the_world_is_let_in_with_a_key_only(tmp_path: Path) -> None:
    data = tmp_path / "with space"
    options = ["serve", "--host", "0.0.0.0", "--port", "0", "--data-dir", str(data), "--upstream", NOWHERE]

    def start() -> subprocess.CompletedProcess[str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("BATCHERY_")}
        command = [sys.executable, "-m", "batchery", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=plain)

    refusal = start()
    assert (refusal.returncode, refusal.stdout) == (1, "")
    assert refusal.stderr.count("\n") == 1
    assert f"batchery keys create --data-dir '{data}'" in refusal.stderr
    _, id = create("--data-dir", str(data))
    done("revoke", id, "--data-dir", str(data))
    assert start().returncode == 1  # it is of no use
    key, _ = create("--data-dir", str(data))
    running = Process(options, tmp_path / "server.log")
    try:
        running.url = running.url.replace("0.0.0.0", "127.0.0.1")
        assert status(running, key) == 200
        assert status(running, None) == 401
    finally:
        assert running.stop() == 0
