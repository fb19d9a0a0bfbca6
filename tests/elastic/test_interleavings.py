"""Does a run survive everything that may befall its members, in every order, without losing or repeating a step?

Whole runs without processes (`simulated_run`), driven by hypothesis and by seeds; what would be lost if the state
machine were otherwise, its mutations say.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Mapping
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from concertina.elastic import generations as module
from concertina.elastic.generations import Generations
from tests.elastic.simulated_run import LEAST, Run

pytestmark = pytest.mark.unit


class Faults(RuleBasedStateMachine):
    """Anything may befall anybody at any moment, while everybody does what it can do, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.run = Run(members=4)

    @rule(picks=st.lists(st.integers(0, 2**16), min_size=1, max_size=60))
    def work(self, picks: list[int]) -> None:
        for pick in picks:
            actions = self.run.possible_actions()
            if actions:
                actions[pick % len(actions)]()

    def _someone(self, pick: int) -> int:
        return sorted(self.run.generations.present)[pick % len(self.run.generations.present)]

    @precondition(lambda self: self.run.generations.present)
    @rule(pick=st.integers(0, 9))
    def lose_falsely(self, pick: int) -> None:
        self.run.lose(self._someone(pick))

    @precondition(lambda self: self.run.generations.present)
    @rule(pick=st.integers(0, 9))
    def die(self, pick: int) -> None:
        self.run.die(self._someone(pick))

    @precondition(lambda self: self.run.lost)
    @rule()
    def notice(self) -> None:
        self.run.lose(*self.run.lost)

    @precondition(lambda self: self.run.generations.present)
    @rule(pick=st.integers(0, 9))
    def freeze(self, pick: int) -> None:
        self.run.members[self._someone(pick)].frozen = True

    @rule()
    def thaw(self) -> None:
        for member in self.run.members.values():
            member.frozen = False

    @precondition(lambda self: len(self.run.generations.present) < 6)
    @rule()
    def join(self) -> None:
        self.run.join()

    @rule()
    def plan(self) -> None:
        self.run.plan()

    @precondition(lambda self: self.run.generations.present)
    @rule(pick=st.integers(0, 9))
    def warn(self, pick: int) -> None:
        self.run.warn(self._someone(pick))

    @rule()
    def take_back(self) -> None:
        self.run.take_back()

    @rule()
    def dismiss(self) -> None:
        self.run.dismiss()

    @precondition(lambda self: self.run.breakable())
    @rule(pick=st.integers(0, 9))
    def fail_network(self, pick: int) -> None:
        waiting = self.run.breakable()
        self.run.fail_network(waiting[pick % len(waiting)])

    @rule()
    def restart(self) -> None:
        self.run.restart()

    @invariant()
    def numbers_grow(self) -> None:
        numbers = self.run.numbers
        assert numbers == sorted(set(numbers))

    def teardown(self) -> None:
        self.run.settle()


class TestFaults(Faults.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=60, stateful_step_count=30)


FAULTS = {"die": 3, "lose": 2, "freeze": 2, "thaw": 3, "join": 3, "plan": 3, "restart": 1, "network": 1, "notice": 12}
WITH_NOTICES = {"warn": 3, "take back": 1, "dismiss": 2, **FAULTS}
"""Apart: what is found by a seed below stays found by it."""


def befall(run: Run, fault: str, chance: Random) -> None:
    living = [member for member in run.generations.present if member not in run.lost]
    match fault:
        case "die" if living:
            run.die(chance.choice(living))
        case "lose" if living:
            run.lose(chance.choice(living))
        case "freeze" if living:
            run.members[chance.choice(living)].frozen = True
        case "thaw":
            for member in run.members.values():
                member.frozen = False
        case "join" if len(living) < 6:
            run.join()
        case "plan":
            run.plan()
        case "warn" if living:
            run.warn(chance.choice(living))
        case "take back":
            run.take_back()
        case "dismiss":
            run.dismiss()
        case "restart":
            run.restart()
        case "network" if run.breakable():
            run.fail_network(chance.choice(run.breakable()))
        case "notice" if run.lost:
            run.lose(chance.choice(run.lost))


def live(
    seed: int,
    kind: type[Generations] = Generations,
    length: int = 400,
    least: int = LEAST,
    faults: Mapping[str, int] = FAULTS,
) -> Run:
    """One run: faults seldom or often, mostly several close together, then peace."""
    chance = Random(seed)
    run = Run(kind, chance.choice([2, 3, 4, 5]), least)
    weights = [weight * chance.choice([0, 1, 1, 3]) for weight in faults.values()]
    weights[-1] = faults["notice"]
    rate, burst = chance.choice([0.003, 0.01, 0.03]), 0
    for _ in range(length):
        burst -= 1
        if chance.random() < max(rate * (8 if run.lost else 1), 0.04 if burst > 0 else 0.0):
            befall(run, chance.choices(list(faults), weights)[0], chance)
            burst = chance.choice([0, 40, 120])
        elif actions := run.possible_actions():
            chance.choice(actions)()
    run.settle()
    return run


def test_no_seed_breaks_a_run() -> None:
    runs = [live(seed) for seed in range(150)]
    assert sum(len(run.committed) for run in runs) > 1000, "they hardly trained"
    assert sum(len(run.numbers) for run in runs) > 300, "hardly anything befell them"
    assert sum(run.restored for run in runs) > 3, "no run lost its state"


def test_no_seed_breaks_a_run_that_waits_with_all_it_has() -> None:
    runs = [live(seed, least=4) for seed in range(100)]
    assert sum(len(run.committed) for run in runs) > 300, "they hardly trained"
    assert sum(run.kept for run in runs) > 10, "they wrote no checkpoints while they were too few"


def test_no_seed_breaks_a_run_whose_nodes_are_taken_back() -> None:
    runs = [live(seed, faults=WITH_NOTICES) for seed in range(100)]
    assert sum(len(run.committed) for run in runs) > 600, "they hardly trained"
    assert sum(bool(run.leaving) for run in runs) > 10, "nobody was to leave"


@pytest.mark.parametrize("leaving", [{0, 1}, {1, 2}, {0, 1, 2}, {0, 3}, {1, 2, 3}], ids=str)
def test_who_leaves_hands_over_all_it_has_however_many_go_together(leaving: set[int]) -> None:
    """Both owners of anything among them: nothing is restored, no step is void."""
    run = Run(members=4, least=1)
    run.settle()
    for member in leaving:
        run.warn(member)
    run.plan()
    run.settle()
    seating = run.generations.seating
    assert seating is not None
    assert leaving.isdisjoint(seating.members)
    run.dismiss()
    run.settle()
    assert run.generations.present.keys() == {0, 1, 2, 3} - leaving
    assert run.restored == 0
    chains = {run.members[member].chain for member in seating.members}
    assert all(chain[: len(run.committed)] == run.committed for chain in chains)


def test_a_spare_may_be_the_only_one_that_knows_of_a_generation() -> None:
    live(5934, length=600)


def test_who_fails_in_a_generation_is_heard_however_long_ago_it_was_last_asked() -> None:
    live(9655, length=600)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(8))
def test_no_seed_of_many_breaks_a_run(part: int) -> None:
    for seed in range(1000 + 2500 * part, 3500 + 2500 * part):
        live(seed, length=600)
        live(seed, length=600, faults=WITH_NOTICES)


MUTATIONS = {
    "stale reports are accepted": (
        "        if report.member not in self.present or not is_new:",
        "        if report.member not in self.present:",
    ),
    "a generation that was overtaken while it moved is forgotten": (
        "            self.reports.clear()\n",
        "            self.reports.clear()\n            moving and self.possible.pop(self.coming.number, None)\n",
    ),
    "the oldest step is taken": ("max(report.step for report in adopted)", "min(report.step for report in adopted)"),
    "who has only verified counts for nothing": (
        "        able |= {report.member for report in self.reports.values() if report.verified == source}\n",
        "",
    ),
    "reports are not cleared": ("            self.reports.clear()\n", "            pass\n"),
    "spares are always waited for": ("        if len(self.possible) > 1:\n", "        if True:\n"),
    "who stopped unasked is not heard": (
        "self.is_settled and not self.holders.isdisjoint(self.reports)",
        "self.is_settled and any(report.failure for report in self.reports.values())",
    ),
    "a checkpoint that was found once is taken again": (
        "        self._restore = None  # next time there may be a newer checkpoint\n",
        "",
    ),
    "who cannot form is not heard": (
        "any(report.failed == coming.number for report in self.reports.values())",
        "False",
    ),
}


def mutated(name: str) -> type[Generations]:
    """The class with one line of it changed."""
    source, (before, after) = inspect.getsource(module), MUTATIONS[name]
    assert source.count(before) == 1, name
    mutant = types.ModuleType("mutant")
    sys.modules["mutant"] = mutant  # dataclasses look there
    exec(compile(source.replace(before, after), "mutant", "exec"), mutant.__dict__)
    shared = {name: getattr(module, name) for name in module.__all__}
    mutant.__dict__.update({name: value for name, value in shared.items() if name != "Generations"})
    kind: type[Generations] = mutant.__dict__["Generations"]
    return kind


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_observer_sees(name: str) -> None:
    """What these runs prove is worth what they find: a fault of `Generations` does not survive them."""
    kind = mutated(name)
    for seed in range(1500):
        try:
            live(seed, kind)
        except (AssertionError, KeyError, IndexError):
            return
    pytest.fail(f"no seed shows that {name}")
