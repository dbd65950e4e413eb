"""`batchery skill`: put the agent skill where agents look for skills, or show it.

It must never change what a user has in these places, unless told to by --force.
"""

from __future__ import annotations

import filecmp
import shutil
import sys
import uuid
from importlib import resources
from pathlib import Path
from typing import Annotated, NoReturn

import typer

NAME = "doubleword-batches"
FOLDERS = (".agents/skills", ".claude/skills")
"""Where agents look, below a project or the home folder: Claude Code has its own place, most others share the first."""

EPILOG = """
Examples:

  batchery skill install

  batchery skill install --user

  batchery skill install --dir .cursor/skills

  batchery skill show references/api_reference.md
"""

group = typer.Typer(help="Install or show the skill with which agents run batches.", no_args_is_help=True)


@group.command(epilog=EPILOG)
def install(
    dir: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="A folder of skills to put it in; repeatable.",
            show_default=" and ".join(FOLDERS) + ", in the current folder",
        ),
    ] = None,
    user: Annotated[bool, typer.Option("--user", help="In the home folder instead: for all projects.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there, with any changes made to it.")] = False,
) -> None:
    """Copy the skill to where agents look. The folders that now have it are printed."""
    if dir and user:
        _fail("--dir and --user say two things; give one of them")
    base = Path.home() if user else Path()
    here = source()
    targets = [folder / NAME for folder in dir or [base / name for name in FOLDERS]]
    changed = [target for target in targets if _is_there(target) and not _same(here, target)]
    if changed and not force:
        _fail(
            f"{', '.join(map(str, changed))}: there already, and not the same; --force replaces it. Nothing was changed"
        )
    for target in targets:
        try:
            if not _same(here, target):
                _copy(here, target)
        except OSError as error:
            _fail(f"{target} cannot be written: {error.strerror or error}")
        print(target)
    print("Agents find it there when they start anew.", file=sys.stderr)


@group.command(epilog=EPILOG)
def show(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Which of its files.")] = "SKILL.md",
) -> None:
    """Print a file of the skill."""
    here = source()
    files = _files(here)
    if file not in files:
        _fail(f"the skill has no {file!r}; it has {', '.join(files)}")
    sys.stdout.write((here / file).read_text(encoding="utf-8"))


def source() -> Path:
    """The skill that came with this version: beside the code in a wheel, at the root of a working copy."""
    packaged = Path(str(resources.files("batchery"))) / "skills" / NAME
    if packaged.is_dir():
        return packaged
    return Path(__file__).parents[3] / "skills" / NAME


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


def _is_there(target: Path) -> bool:
    return target.exists() or target.is_symlink()


def _same(source: Path, target: Path) -> bool:
    if not target.is_dir() or _files(source) != _files(target):
        return False
    _, different, failed = filecmp.cmpfiles(source, target, _files(source), shallow=False)
    return not different and not failed


def _copy(source: Path, target: Path) -> None:
    """Put a whole copy in place of what is there; whenever it is stopped, one of the two is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    new, old = (target.with_name(f".{target.name}.{kind}-{mark}") for kind in ("new", "old"))
    try:
        shutil.copytree(source, new, ignore=shutil.ignore_patterns("__pycache__"))
        if _is_there(target):
            target.rename(old)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if old.is_symlink() or old.is_file():
        old.unlink()
    elif old.exists():
        shutil.rmtree(old)


def _fail(message: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    raise typer.Exit(1)
