"""Does what the documentation tells people to type work: every page, every --help?

A page may write RUN for a run's id. One short run is trained for all of them; `train` itself is run shortened.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from jobs.cli import COMMANDS
from tests.house.documented import Documented, commands, help_examples
from tests.house.tree import ROOT

CHEAP = {"validate", "layout"}
ELSEWHERE = {"chaos", "lab"}  # run by tests/actors/test_chaos.py, and tests/jobs/test_lab.py
SHORT = [
    "training.steps=4",
    "training.warmup_steps=1",
    "training.global_batch_size=4",
    "training.eval_sequences=4",
    "data.max_bytes=300000",
    "data.sequence_length=64",
    "data.tokenizer.vocab_size=512",
    "model.hidden_size=64",
]


ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command line as a person types it, in `folder`, with `concertina` from this checkout."""
    program = folder / ".bin" / "concertina"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jobs.cli "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return finished(["bash", "-c", line], folder, ENVIRONMENT | {"PATH": path})


def finished(words: list[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A process that has ended, whatever its exit code, and what it said."""
    return subprocess.run(
        words, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100
    )


@cache
def help_of(*command: str) -> str:
    """`concertina COMMAND --help`, with that of its subcommands below it."""
    done = finished([sys.executable, "-m", "jobs.cli", *command, "--help"], ROOT, ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    below = re.search(r"^Commands:\n((?:  .*\n?)+)", done.stdout, flags=re.MULTILINE)
    names = re.findall(r"^  (\S+)", below.group(1), flags=re.MULTILINE) if below else []
    return "\n".join([done.stdout, *(help_of(*command, name) for name in names)])


def all_documented() -> Iterator[Documented]:
    """Pages first, then --help; each line once."""
    seen = set()
    found = [*commands(), *(example for name, _ in COMMANDS for example in help_examples(name, help_of(name)))]
    for documented in found:
        if documented.line not in seen and documented.words[0] == "concertina":
            seen.add(documented.line)
            yield documented


def check(documented: Documented, folder: Path) -> None:
    """Run it and compare with what the page says."""
    done = shell(documented.line, folder)
    said = f"{documented.place}: {documented.line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    if documented.refusal is None:
        assert done.returncode == 0, said
    else:
        assert done.returncode == 2, said
        assert documented.refusal in done.stderr.splitlines(), said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a person would stand: a checkout's root, with runs of its own."""
    place = tmp_path_factory.mktemp("documented")
    (place / "jobs").symlink_to(ROOT / "jobs")
    (place / "README.md").symlink_to(ROOT / "README.md")
    return place


@pytest.mark.unit
@pytest.mark.parametrize("command", [name for name, _ in COMMANDS])
def test_every_help_has_an_example(command: str) -> None:
    assert help_examples(command, help_of(command))


@pytest.mark.unit
def test_cheap_commands_run(folder: Path) -> None:
    cheap = [documented for documented in all_documented() if documented.words[1] in CHEAP]
    assert cheap
    for documented in cheap:
        check(documented, folder)


@pytest.mark.unit
def test_documented_options_exist() -> None:
    for documented in all_documented():
        words = documented.words[1:]
        words = words[: words.index("--")] if "--" in words else words  # what follows is another command's
        known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_of(words[0]) if words[0][0] != "-" else ""))
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= known | {"--help", "--version", "--debug"}, f"{documented.place}: {documented.line}"


@pytest.mark.unit
def test_documented_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for documented in commands():
        if documented.words[0] == "make":
            assert {word for word in documented.words[1:] if "=" not in word} <= targets, documented


def shortened(line: str) -> str:
    """The same line without its own overrides (the next test checks them), for a job that takes seconds."""
    bare = re.sub(r" --set \S+", "", line).partition(" |")[0]
    if "--resume" in bare:
        return f"{bare} --set training.steps=6"
    if re.match(r"concertina (train|data)", bare):
        return " --set ".join([bare, *SHORT])
    return bare


@pytest.mark.unit
def test_documented_overrides_are_keys(folder: Path) -> None:
    overrides = {word for found in all_documented() for word in re.findall(r"--set (\S+)", found.line)}
    for override in sorted(overrides):
        check(Documented("--set", f"concertina validate quickstart --set {override}"), folder)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_the_others_run_on_a_trained_run(folder: Path) -> None:
    others = [found for found in all_documented() if len(found.words) > 1 and found.words[1] not in CHEAP | ELSEWHERE]
    first = [found for found in others if found.words[1] == "train" and "--resume" not in found.words]
    lines: dict[str, Documented] = {}
    for found in [*first, *others]:  # trained first: whatever else is documented looks at a run
        lines.setdefault(shortened(found.line), found)
    named = {re.sub(r" --run \S+", "", line) for line in lines if " --run " in line}
    for line, found in lines.items():
        if line in named:
            continue  # the same with a name runs anyway
        done = [path.parent.name for path in sorted((folder / "runs").glob("*/events.jsonl"), key=os.path.getmtime)]
        told = re.sub(r"\bRUN\b", done[-1] if done else "", line)
        check(Documented(found.place, told, found.refusal), folder)
