"""`batchery skill`, and that a wheel has all of it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKILL = ROOT / "skills" / "doubleword-batches"


def skill(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "batchery", "skill", *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        check=False,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_it_is_put_where_agents_look(tmp_path: Path) -> None:
    done = skill(tmp_path, "install")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [".agents/skills/doubleword-batches", ".claude/skills/doubleword-batches"]
    for name in done.stdout.splitlines():
        assert files(tmp_path / name) == files(SKILL)
    assert skill(tmp_path, "install").returncode == 0
    assert skill(tmp_path, "install", "--user").returncode == 0
    assert files(tmp_path / "home/.claude/skills/doubleword-batches") == files(SKILL)
    helped = subprocess.run(
        [sys.executable, "-I", "-S", ".claude/skills/doubleword-batches/scripts/submit_batch.py", "--help"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
    )
    assert helped.returncode == 0


def test_changes_are_kept_unless_forced(tmp_path: Path) -> None:
    assert skill(tmp_path, "install", "--dir", "mine").returncode == 0
    edited = tmp_path / "mine/doubleword-batches/scripts/create_batch_file.py"
    edited.write_text("mine\n")
    refused = skill(tmp_path, "install", "--dir", "mine", "--dir", "other")
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    assert edited.read_text() == "mine\n"
    assert not (tmp_path / "other").exists()
    assert skill(tmp_path, "install", "--dir", "mine", "--force").returncode == 0
    assert files(tmp_path / "mine/doubleword-batches") == files(SKILL)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["doubleword-batches"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "doubleword-batches").symlink_to(tmp_path / "precious")
    assert skill(tmp_path, "install", "--dir", "mine").returncode == 1
    assert skill(tmp_path, "install", "--dir", "mine", "--force").returncode == 0
    assert (tmp_path / "precious" / "file").read_text() == "x"
    assert files(tmp_path / "mine/doubleword-batches") == files(SKILL)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = skill(tmp_path, "install", "--dir", "file")
    assert done.returncode == 1
    assert "file/doubleword-batches" in done.stderr
    assert "Traceback" not in done.stderr


def test_show(tmp_path: Path) -> None:
    assert skill(tmp_path, "show").stdout == (SKILL / "SKILL.md").read_text()
    reference = skill(tmp_path, "show", "references/api_reference.md")
    assert reference.stdout == (SKILL / "references" / "api_reference.md").read_text()
    refused = skill(tmp_path, "show", "../../pyproject.toml")
    assert refused.returncode == 1
    assert "SKILL.md" in refused.stderr


def test_the_front_matter_is_valid() -> None:
    """As https://agentskills.io/specification has it."""
    text = (SKILL / "SKILL.md").read_text()
    matter = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert matter
    fields = dict(line.split(": ", 1) for line in matter[1].splitlines())
    assert fields.keys() <= {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}
    assert fields["name"] == SKILL.name
    assert 1 <= len(fields["description"]) <= 1024
    assert len(fields["compatibility"]) <= 500
    assert ": " not in fields["description"]  # which would make another mapping of it
    assert text.count("\n") <= 500
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (SKILL / target).is_file(), target
    for script in re.findall(r"scripts/\w+\.py", text):
        assert (SKILL / script).is_file(), script


def test_a_wheel_has_it_and_installs_it(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert files(site / "batchery" / "skills" / "doubleword-batches") == files(SKILL)
    done = subprocess.run(
        [sys.executable, "-c", "from batchery.cli import skill; print(skill.source())"],
        env={"PYTHONPATH": str(site)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(done.stdout.strip()) == site / "batchery" / "skills" / "doubleword-batches"
