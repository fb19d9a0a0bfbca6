"""What can happen to a member, and who is lost by it? Each deed strikes a session at rest, and waits until it is whole.

A deed returns the members that it should have cost; that nobody else was lost is seen by who calls it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from random import Random

from benchmarks.faults.session import Session
from concertina.elastic.chaos import Deed
from concertina.elastic.notices import Notice, Source

__all__ = ["DEEDS", "choose"]

_WHILE_CHANGING = ("halted", "preparing", "prepared", "moving", "verified", "adopted")
_WHILE_TRAINING = ("step", "validation", "checkpoint")
_LEAD_S = 4.0
_LEAVES_BY_ITSELF_S = 10.0


def killed(session: Session, random: Random) -> set[int]:
    """SIGKILL, at any moment."""
    return _signalled(session, random, signal.SIGKILL)


def crashed(session: Session, random: Random) -> set[int]:
    """SIGABRT, as of an assertion in a library."""
    return _signalled(session, random, signal.SIGABRT)


def terminated(session: Session, random: Random) -> set[int]:
    """SIGTERM."""
    return _signalled(session, random, signal.SIGTERM)


def frozen(session: Session, random: Random) -> set[int]:
    """It stands still for good."""
    return _signalled(session, random, signal.SIGSTOP)


def _signalled(session: Session, random: Random, number: signal.Signals) -> set[int]:
    victim = random.choice(session.mortal)
    session.process(victim).send(number)
    session.await_whole({victim})
    return {victim}


def two_at_once(session: Session, random: Random) -> set[int]:
    """Two of four are killed: perhaps both owners of a part of the state, and then a checkpoint is gone back to."""
    victims = random.sample(session.mortal, 2)
    for process in [session.process(victim) for victim in victims]:
        process.send(signal.SIGKILL)
    session.await_whole(victims)
    return set(victims)


def killed_at_work(session: Session, random: Random) -> set[int]:
    """At the very moment at which it begins a step, a validation, or writes a checkpoint."""
    victim = random.choice(session.mortal)
    session.process(victim).ask("fuse", Deed.KILL, None, random.choice(_WHILE_TRAINING))
    session.await_whole({victim})
    return {victim}


def killed_while_others_recover(session: Session, random: Random) -> set[int]:
    """One is killed, and in the change that follows another one, when it comes to one of its phases."""
    first, second = random.sample(session.mortal, 2)
    other = session.process(second)
    other.ask("fuse", Deed.KILL, None, random.choice(_WHILE_CHANGING))
    session.process(first).send(signal.SIGKILL)
    session.await_whole({first})
    if other.ask("fuse", None, None, "") is not None:  # it did not come to that phase
        return {first}
    session.await_whole({first, second})
    return {first, second}


def back_from_the_dead(session: Session, random: Random) -> set[int]:
    """It stands still, out of reach, and goes on when the others have gone on without it: it must see that."""
    victim = random.choice(session.mortal)
    process = session.process(victim)
    session.hands.out_of_reach[victim] = process
    process.send(signal.SIGSTOP)
    session.await_whole({victim})
    process.send(signal.SIGCONT)
    session.until(lambda: process.has_ended, f"and member {victim} gone")
    del session.hands.out_of_reach[victim]
    process.end()
    return {victim}


def stopped_for_a_moment(session: Session, random: Random) -> set[int]:
    """Shorter than anybody is given up for."""
    process = session.process(random.choice(list(session.hands.members)))
    process.send(signal.SIGSTOP)
    time.sleep(random.uniform(0.05, 0.4))
    process.send(signal.SIGCONT)
    return _nothing(session)


def cut_off_for_a_moment(session: Session, random: Random) -> set[int]:
    """Its connection to the coordinator breaks; it makes another."""
    session.process(random.choice(list(session.hands.members))).ask("cut")
    return _nothing(session)


def bit_flipped(session: Session, random: Random) -> set[int]:
    """In a weight, in its memory: it is named before the step is applied."""
    victim = random.choice(session.mortal)
    session.process(victim).ask("fuse", Deed.CORRUPT, session.step + 1, "")
    session.await_whole({victim})
    return {victim}


def node_taken_back(session: Session, random: Random) -> set[int]:
    """With a notice; another node is there by then. Its member leaves, and is not lost."""
    victim = random.choice(session.mortal)
    node = session.hands.members[victim].node_id
    session.cluster.add()
    session.conductor.departures.hear(node, [Source.AWS], [Notice(Source.AWS, _LEAD_S, "terminate")])
    session.await_whole({victim})
    session.cluster.remove(node)
    session.conductor.departures.hear(node, [Source.AWS], [])
    return set()


def notice_while_others_recover(session: Session, random: Random) -> set[int]:
    """One is killed, and in the change that follows a node is told that it will be taken back."""
    leaves, dies = random.sample(session.mortal, 2)
    node = session.hands.members[leaves].node_id
    session.process(dies).send(signal.SIGKILL)
    time.sleep(random.uniform(0, 0.2))
    session.cluster.add()
    session.conductor.departures.hear(node, [Source.AWS], [Notice(Source.AWS, _LEAD_S, "terminate")])
    session.await_whole({leaves, dies})
    session.cluster.remove(node)
    session.conductor.departures.hear(node, [Source.AWS], [])
    return {dies}


def notice_taken_back(session: Session, random: Random) -> set[int]:
    """Before anybody has left for it."""
    node = session.hands.members[random.choice(session.mortal)].node_id
    session.conductor.departures.hear(node, [Source.AZURE], [Notice(Source.AZURE, 30.0, "preempt")])
    time.sleep(random.uniform(0.1, 0.5))
    session.conductor.departures.hear(node, [Source.AZURE], [])
    return _nothing(session)


def _nothing(session: Session) -> set[int]:
    """Nobody is lost: some steps are waited for in which it would show."""
    until = session.step + 5
    session.until(lambda: session.step >= until, "after a trifle")
    session.await_whole()
    return set()


Strike = Callable[[Session, Random], set[int]]
DEEDS: dict[Strike, int] = {
    killed: 30,
    killed_at_work: 15,
    killed_while_others_recover: 15,
    crashed: 5,
    terminated: 5,
    two_at_once: 3,
    frozen: 4,
    back_from_the_dead: 3,
    stopped_for_a_moment: 6,
    cut_off_for_a_moment: 6,
    bit_flipped: 5,
    node_taken_back: 2,
    notice_while_others_recover: 2,
    notice_taken_back: 2,
}
"""How often each comes, in a hundred or so."""


def choose(random: Random) -> Strike:
    return random.choices(list(DEEDS), list(DEEDS.values()))[0]
