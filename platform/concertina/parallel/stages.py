"""How do activations and their gradients get from one pipeline stage to another? In the order of the plan.

Both ends know the whole plan: the receiver, in which order each other stage sends to it; the sender, what must have
been taken when something made later comes back. So receives are posted ahead, nothing is asked, and a tensor that was
sent is kept until it is known to have arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from concertina.parallel.collectives import Pending, exchange
from concertina.parallel.groups import Group
from concertina.schedule.pipeline import Action, Plan

__all__ = ["Mailbox"]

_AHEAD = 2
"""Receives from a stage that are posted before they are needed."""


class Mailbox:
    """Of one stage in `group` (pp), for one run through `plan`. A message is called by the action that takes it.

    `empty(micro_batch)` gives room for a message of that micro-batch.
    """

    def __init__(self, group: Group, plan: Plan, empty: Callable[[int], Tensor]) -> None:
        self.group, self.plan, self._empty = group, plan, empty
        self._place = {action: place for actions in plan.actions for place, action in enumerate(actions)}
        self._coming = {stage: deque(self._from(stage)) for stage in range(plan.num_stages) if stage != group.rank}
        self._posted: dict[int, dict[Action, Pending[list[Tensor]]]] = {stage: {} for stage in self._coming}
        self._sent: dict[int, list[tuple[Action, Pending[list[Tensor]]]]] = {stage: [] for stage in self._coming}
        for stage in self._coming:
            self._post(stage)

    def _from(self, stage: int) -> list[Action]:
        """Messages that `stage` sends here, in its order."""
        takers = (self.plan.after(action) for action in self.plan.actions[stage])
        return [taker for taker in takers if taker is not None and self.plan.stage_of(taker) == self.group.rank]

    def _post(self, stage: int, until: Action | None = None) -> None:
        """Be ready for the next messages of `stage`, and for that of `until` in any case: two stages of several pieces
        do not always take in the order in which they send."""
        coming, posted = self._coming[stage], self._posted[stage]
        while coming and (len(posted) < _AHEAD or (until is not None and until not in posted)):
            taker = coming.popleft()
            posted[taker] = exchange([], [(self._empty(taker.micro_batch), stage)], self.group)

    def take(self, action: Action) -> Tensor | None:
        """What `action` of this stage needs; None at the ends of the model."""
        maker = self.plan.before(action)
        if maker is None:
            return None
        stage = self.plan.stage_of(maker)
        self._post(stage, action)
        (x,) = self._posted[stage].pop(action).finish()
        self._post(stage)
        self._let_go(stage, self._place[maker])
        return x

    def _let_go(self, stage: int, place: int) -> None:
        """What `stage` has taken before its action number `place`, which it has done."""
        kept = []
        for taker, pending in self._sent[stage]:
            if self._place[taker] < place:
                pending.finish()
            else:
                kept.append((taker, pending))
        self._sent[stage] = kept

    def send(self, action: Action, x: Tensor) -> None:
        """Hand over what `action` of this stage has made, where another needs it."""
        taker = self.plan.after(action)
        if taker is None:
            return
        stage = self.plan.stage_of(taker)
        self._sent[stage].append((taker, exchange([(x, stage)], [], self.group)))
        # Without a backward nothing comes back that would tell. A stage may be ahead of another by a group of
        # micro-batches, which is fewer than two a stage: fewer kept, and stages would wait for each other.
        if not self.plan.has_backward and len(self._sent[stage]) > 2 * self.plan.num_stages + _AHEAD:
            self._sent[stage].pop(0)[1].finish()

    def close(self) -> None:
        """Wait until all has arrived."""
        assert not any(self._posted.values()), "something was sent that nobody took"
        for stage in self._sent:
            self._let_go(stage, len(self._place))
