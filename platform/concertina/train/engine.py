"""What does one rank compute? A step, a validation, and the boxes of state it owns.

Gradients are of *sums* over tokens and are divided once by the global number of tokens, so neither micro-batches nor
the shares of ranks change the mathematics. One all-reduce a step carries everything ranks must agree on: the norm, the
losses, the acknowledgement of the step before, and the control word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concertina.config import Job
from concertina.data import IGNORED_TARGET, Sequences, make_sampler, parts_of, share
from concertina.errors import CheckpointError
from concertina.layout import Box, Layout, Seating, Shard, cut, shards
from concertina.layout.reshard import ReshardPlan, plan_moves
from concertina.model import Batch, Decoder, ModelOutput, Place
from concertina.model.deferred import DeferredGradients
from concertina.parallel.collectives import all_reduce_sum
from concertina.parallel.groups import SECONDS, Group, Groups
from concertina.parallel.reducer import GradientReducer
from concertina.schedule.pipeline import Plan, forward_plan, training_plan
from concertina.state.alike import spread_alike
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import load_boxes
from concertina.state.manifest import read_manifest
from concertina.state.transfer import TransferReport, transfer
from concertina.train.anomaly import Anomaly, AnomalyWatch
from concertina.train.corruption import SilentCorruption, find_corruption
from concertina.train.learning_rate import learning_rate
from concertina.train.optimizer import ShardedAdamW
from concertina.train.pipeline import Backward, MicroBatch, run
from concertina.train.share import DTYPES, Share, Values

__all__ = ["DTYPES", "Engine", "StepResult"]

_HEAD = ("sum_of_squares", "loss", "aux_loss", "z_loss", "tokens", "dropped", "acknowledged", "word")


@dataclass(frozen=True)
class StepResult:
    """One applied step, equal on every rank. Losses are means over the global batch's `tokens`; `dropped` is the share
    of the routers' choices that found their expert full."""

    step: int
    loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    imbalance: float
    dropped: float
    word: int
    acknowledged: bool
    anomaly: Anomaly | None

    def metrics(self) -> dict[str, float]:
        """What is tracked of a committed step."""
        names = ("loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens", "imbalance", "dropped")
        return {name: float(getattr(self, name)) for name in names}


class Engine:
    """One rank's computing, over whatever share of the model it has: the engine stays, shares change by generation."""

    def __init__(self, job: Job, train: Sequences, validation: Sequences, device: torch.device) -> None:
        self.job = job
        self.train = train
        self.validation = validation
        self.device = device
        self.sampler = make_sampler(train, job.training.global_batch_size, job.training.seed)
        self.watch = AnomalyWatch(job.training.anomaly)
        self.applied = 0
        self.tokens = 0
        self.check: Callable[[], None] = lambda: None  # raises when a step is not to be finished; holds no share
        self.last_totals: tuple[int, list[float]] | None = None
        self.last_result: StepResult | None = None
        # Whole tensors', also of those that are on other stages.
        self._shapes = {name: shard.global_shape for name, shard in shards(job.model, Layout(1), 0).items()}
        self._share: Share | None = None
        self._gradients: tuple[int, list[Tensor]] | None = None

    # -- generations ----------------------------------------------------------------------------------------------

    def prepare(self, seating: Seating, rank: int, groups: Groups, values: Values) -> Share:
        """A share for another generation, beside the current one, which goes on meanwhile. No collective.

        With values "initial" it has the start values of training, and its second copies are still to be filled.
        """
        assert groups.rank == rank, "groups were formed for another rank"
        return Share(self.job, seating, groups, values, self.device, self.check)

    def adopt(self, share: Share | None, publish: bool = True) -> None:
        """Go on with `share` (None: as a spare, with nothing), and let go of the one before. Collective over the world
        where state was moved in: weights go round. Should that fail, the share is current all the same and holds all
        its state. What is under way in the one before is over: `settle` or `Share.abandon` has been called."""
        assert share is None or share.filled, "state is moved in before a share is adopted"
        self._share, self._gradients = share, None
        if share is not None and publish:
            self._send_weights_due()

    def _send_weights_due(self) -> None:
        """Weights go round that were held back. Collective over the world if they were: of all ranks or of none."""
        if self.share.weights_due:
            self.share.weights_due = False
            self.optimizer.publish()

    def configure(self, layout: Layout, rank: int, groups: Groups) -> None:
        """Begin on a layout without second owners, with the start values of training. No collective."""
        nobody = (None,) * layout.world
        self.adopt(self.prepare(Seating(layout, tuple(range(layout.world)), nobody), rank, groups, "initial"))

    def move(
        self,
        new: Share | None,
        seating: Seating,
        member: int,
        plan: ReshardPlan,
        crowd: Group,
        verified: Callable[[], None] = lambda: None,
    ) -> TransferReport:
        """Fill `new` (None for a spare) by `plan` with what members hold, this one's current share among them. Every
        member of the seating must call it; it stands in `crowd` as in the roster.

        Members that have no state learn steps, tokens and the recent past too. Raises StateError on every member when
        not all arrived as it was sent, or members that hold state stand at different steps; current shares are as
        they were. `verified` is called when `new` has its state: when this has returned anywhere, it was called
        everywhere.
        """
        old = self._share
        own = (self._facts_alike(), old.held_alike()) if old is not None and old.filled else None
        alike = spread_alike(own, crowd, self.device)

        def before_vote() -> None:
            if new is not None:
                for name, tensor in new.held_alike().items():
                    alike.write(name, tensor)
                new.fill(int(alike.facts["updates"]))
                self._take_facts(alike.facts)
            verified()

        return transfer(
            plan,
            member,
            seating.roster,
            old.held() if old is not None else {},
            new.holdings() if new is not None else {},
            crowd,
            [alike.fault] if alike.fault is not None else [],
            before_vote=before_vote,
        )

    def start_anew(self, weights: Path | None = None) -> None:
        """Stand before the first step, whatever was done before. The share has start values, or those that a checkpoint
        of any layout has for `weights` and routers' biases: moments, which it may lack, begin at zero in any case.
        Second owners get their copies. Collective over the world. Raises CheckpointError as `load` does."""
        if weights is not None:
            state = self.state() | self._held_alike()
            load_boxes(weights, {key: boxed for key, boxed in state.items() if not key.startswith("exp_avg")})
            self.share.weights_due = True
        self._take_facts({"step": 0, "tokens": 0, "anomalies": AnomalyWatch(self.job.training.anomaly).state()})
        self.last_totals = self.last_result = None
        self.fill_seconds()
        self._send_weights_due()

    def fill_seconds(self) -> TransferReport | None:
        """Give second owners their copies: after a start or a checkpoint, which fill first owners only. Collective over
        the world; None where nobody is second owner."""
        seating = self.share.seating
        member = seating.members[self.rank]
        if all(second is None for second in seating.seconds):
            return None
        firsts_only = Seating(seating.layout, seating.members, (None,) * seating.layout.world)
        everyone = Seating(seating.layout, seating.members, seating.seconds)
        apart = {other: str(other) for other in seating.members}
        plan = plan_moves(self.job.model, firsts_only, everyone, seating.members, apart, only=member)
        self.share.seconds.filled = not self.share.seconds.copies
        held, wanted = self.share.held(), self.share.holdings()
        report = transfer(plan, member, seating.members, held, wanted, self.groups[SECONDS])
        self.share.fill(self.optimizer.updates)
        return report

    @property
    def share(self) -> Share:
        assert self._share is not None, "the engine has no share yet"
        return self._share

    @property
    def layout(self) -> Layout:
        return self.share.layout

    @property
    def rank(self) -> int:
        return self.share.rank

    @property
    def groups(self) -> Groups:
        return self.share.groups

    @property
    def decoder(self) -> Decoder:
        return self.share.decoder

    @property
    def shards(self) -> dict[str, Shard]:
        return self.share.shards

    @property
    def deferred(self) -> DeferredGradients:
        return self.share.deferred

    @property
    def reducer(self) -> GradientReducer:
        return self.share.reducer

    @property
    def optimizer(self) -> ShardedAdamW:
        return self.share.optimizer

    # -- a step ---------------------------------------------------------------------------------------------------

    def train_step(self, step: int, word: int = 0, parting: int = 0) -> StepResult:
        """Compute and apply step `step` (from 1). Every rank of the world calls it; `word` counts on rank 0 only.
        After one with a bit of `parting`, the same on every rank, new weights do not go round: nobody reads them where
        the state moves to another share next.

        When a peer is lost it raises what the backend does; then `pending` says whether `complete` can still finish the
        step, `applied` whether it is done. Raises SilentCorruption on every rank when copies differ that must not:
        then nobody applies the step.
        """
        self._gradients = None
        self._send_weights_due()
        sums = self._forward_backward(step)
        shards = self.reducer.finish()
        seconds = self.share.seconds
        seconds.start(shards)
        head = torch.stack([self.optimizer.local_sum_of_squares(shards), *sums[:5]])
        votes = head.new_tensor([float(self.applied == step - 1), float(word if self.rank == 0 else 0)])
        seconds.finish()
        self._look_for_corruption(step)
        # Taking part in the all-reduce says: whatever its result is, this rank can finish the step with it.
        self._gradients = step, shards
        result = self.complete(self._agree(torch.cat([head, votes, sums[5:]])))
        if result.anomaly is None:
            self.share.weights_due = True
            if not result.word & parting:
                self._send_weights_due()
        return result

    def _look_for_corruption(self, step: int) -> None:
        """At the steps at which all look."""
        every = self.job.elastic.verify_every_steps
        if every and step % every == 0 and self.layout.world > 1 and (found := find_corruption(self.share)):
            raise SilentCorruption.of(found, step, self.rank)

    def _agree(self, vector: Tensor) -> list[float]:
        """The one all-reduce of a step."""
        return all_reduce_sum(vector, self.groups.world).finish().tolist()

    @property
    def pending(self) -> int | None:
        """The step of which this rank has all gradients, own ones and those for its second copies, and no totals."""
        return self._gradients[0] if self._gradients is not None else None

    def complete(self, totals: list[float]) -> StepResult:
        """Finish the pending step with what the all-reduce gave, here or on another rank: the same to the bit.

        No collective: nothing here waits for anybody, or can fail for lack of one. New weights do not go round.
        """
        assert self._gradients is not None, "no step is pending"
        (step, shards), self._gradients = self._gradients, None
        self.last_totals = step, totals
        counts = totals[len(_HEAD) :]
        result = self._judge(step, dict(zip(_HEAD, totals, strict=False)), counts)
        if result.anomaly is None:
            # Clipping and the division by the global token count are one factor.
            scale = min(1.0, self.job.training.max_grad_norm / (result.grad_norm + 1e-6)) / result.tokens
            self.optimizer.apply(shards, scale, result.learning_rate)
            self.share.seconds.apply(scale, result.learning_rate)
            wide = torch.tensor(counts, dtype=torch.float64, device=self.device)
            self.decoder.balance(wide.view(-1, self.job.model.num_experts))
        if result.anomaly is None or result.anomaly.action == "skip":
            self.applied = step
            self.tokens += result.tokens
            self.watch.note(step, result.loss, result.anomaly)
        self.last_result = result
        return result

    def void(self) -> None:
        """Nobody has applied the pending step, nor will: forget its gradients."""
        self._gradients = None

    def _forward_backward(self, step: int) -> Tensor:
        """Sums over this rank's part of a step: loss, aux, z, tokens, choices dropped, then tokens of each layer's each
        expert."""
        batch, me = self.sampler.batch(step - 1), self.groups["dp"].rank
        numbers = self._micro_batches(len(batch), self.job.model.capacity.whole_sequences)
        pieces = []
        for theirs in numbers:
            ids = [batch[number] for number in theirs[me]]
            peers = tuple(len(others) or 1 for others in theirs)
            pieces.append((ids, Place(step, theirs[me][0] if ids else 0, peers)))
        plan = training_plan(self.layout.pp, self.layout.virtual, len(numbers))
        self.reducer.begin()
        backward = Backward(self._objective, self.reducer, self.job.training.recomputed)
        return self._run(self.train, pieces, plan, backward)

    def _objective(self, output: ModelOutput) -> Tensor:
        model = self.job.model
        objective = output.loss_sum + model.router_aux_loss_coef * output.aux_sum
        return objective + model.router_z_loss_coef * output.z_sum

    def _run(
        self,
        view: Sequences,
        pieces: Sequence[tuple[list[int], Place | None]],
        plan: Plan,
        backward: Backward | None = None,
    ) -> Tensor:
        """Compute micro-batches by a plan; the sums of what this rank's stage gives."""
        length = self.job.data.sequence_length
        micro_batches = [
            MicroBatch(len(ids) or 1, length, partial(self._batch, view, ids, place)) for ids, place in pieces
        ]
        total: Tensor | None = None
        for action, output in run(self.decoder, plan, micro_batches, backward):
            ids, _ = pieces[action.micro_batch]
            sums = _as_vector(output) if ids else torch.zeros_like(_as_vector(output))
            total = sums if total is None else total + sums
        assert total is not None, "a stage has a piece, a step a micro-batch"
        return total

    def _batch(self, view: Sequences, ids: list[int], place: Place | None = None) -> Batch:
        """Some sequences. A rank without any computes one whose targets are all left out: its losses and gradients are
        exactly zero, and its peers get the exchanges they wait for."""
        tokens, targets = view.read(ids or [0])
        if not ids:
            targets = torch.full_like(targets, IGNORED_TARGET)
        starts = view.starts(ids or [0]) if self.job.data.document_mask else None
        return self.decoder.begin(tokens.to(self.device), targets.to(self.device), place, starts)

    def _micro_batches(self, count: int, whole: int = 1) -> list[list[list[int]]]:
        """The sequences of every rank of dp, by number among `count`, in equally many pieces on every rank: peers of an
        exchange must come along. No piece parts `whole` consecutive ones. Who is slower may have fewer."""
        parts, loads = self.layout.dp, self.share.seating.loads
        shares = [share(range(count), parts, index, whole, loads) for index in range(parts)]
        largest = max(map(len, shares))
        alike = len(share(range(count), parts, 0, whole))  # whose loads differ: no micro-batch is larger for that
        micro_batch_size = self.job.training.micro_batch_size or (alike if self.job.layout.pp == 1 else whole)
        count = math.ceil(largest / micro_batch_size)
        return [[share(ids, count, piece, whole) for ids in shares] for piece in range(count)]

    def _judge(self, step: int, totals: dict[str, float], counts: list[float]) -> StepResult:
        tokens = totals["tokens"] or 1.0  # a batch may predict nothing: then all sums are zero
        loss, norm = totals["loss"] / tokens, math.sqrt(totals["sum_of_squares"]) / tokens
        return StepResult(
            step=step,
            loss=loss,
            aux_loss=totals["aux_loss"] / tokens,
            z_loss=totals["z_loss"] / tokens,
            grad_norm=norm,
            learning_rate=learning_rate(self.job.training, step),
            tokens=int(tokens),
            imbalance=_imbalance(counts, self.job.model.num_experts),
            dropped=totals["dropped"] / (sum(counts) or 1.0),
            word=int(totals["word"]),
            acknowledged=totals["acknowledged"] == self.layout.world,
            anomaly=self.watch.judge(step, loss, norm),
        )

    def confirm(self) -> bool:
        """Whether every rank has applied the step this one has: commits the last step. Collective over the world."""
        applied = torch.tensor([1.0, float(self.applied)], dtype=torch.float64, device=self.device)
        ranks, total = all_reduce_sum(applied, self.groups.world).finish().tolist()
        return total == ranks * self.applied

    def settle(self) -> None:
        """Wait until the weights are those of the last applied step, which otherwise the next forward does."""
        self.optimizer.arrive()

    # -- validation -----------------------------------------------------------------------------------------------

    def evaluate(self) -> float:
        """Mean loss over the same held-out sequences every time, of a mixture by its weights. Collective over the
        world."""
        return self.weigh(self.evaluate_sources())

    def weigh(self, by_source: dict[str, float]) -> float:
        """The one loss of those of the sources."""
        return sum(part.weight * by_source[part.name] for part in parts_of(self.validation))

    @torch.no_grad()
    def evaluate_sources(self) -> dict[str, float]:
        """The loss of each source of a mixture, by its name; of a corpus alone, by none. Collective over the world.

        Dropless, whatever the capacity in training: a sequence's loss does not depend on its neighbours.
        """
        parts, wanted = parts_of(self.validation), self.job.training.eval_sequences
        shares = [cut(wanted, len(parts), index) for index in range(len(parts))]
        sums = [self._evaluate(part.sequences, b - a) for part, (a, b) in zip(parts, shares, strict=True)]
        found = all_reduce_sum(torch.cat(sums), self.groups.world).finish().view(-1, 2).tolist()
        return {part.name: loss / (tokens_seen or 1.0) for part, (loss, tokens_seen) in zip(parts, found, strict=True)}

    def _evaluate(self, view: Sequences, wanted: int) -> Tensor:
        """Loss and tokens, summed over this rank's part of so many held-out sequences, one at least."""
        number = min(max(1, wanted), len(view))
        chosen = [cut(len(view), number, index)[0] for index in range(number)]
        me = self.groups["dp"].rank
        pieces = [([chosen[n] for n in numbers[me]], None) for numbers in self._micro_batches(number)]
        plan = forward_plan(self.layout.pp, self.layout.virtual, len(pieces))
        loss, _, _, tokens, *_ = self._run(view, pieces, plan).unbind()
        return torch.stack([loss, tokens])

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self, rank: int | None = None) -> dict[str, BoxedTensor]:
        """The live boxes this rank owns: master weights and both moments of its optimizer shards, and, on the first
        rank, what all hold alike. With another `rank`, of which this one is second owner, what that one owns: the same
        numbers."""
        rank = self.rank if rank is None else rank
        owner = self.optimizer if rank == self.rank else self.share.seconds.copies[rank]
        pieces = {
            key: BoxedTensor(view, box, self._shapes[key.split("/", 1)[1]])
            for key, (box, view) in owner.pieces().items()
        }
        return pieces | (self._held_alike() if rank == 0 else {})

    def _held_alike(self) -> dict[str, BoxedTensor]:
        """The routers' biases, whole."""
        shape = (self.job.model.num_experts,)
        return {name: BoxedTensor(bias, Box.whole(shape), shape) for name, bias in self.share.held_alike().items()}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must know beside tensors; JSON-able, equal on every rank."""
        return self._facts_alike() | {"layout": self.layout.facts, "precision": self.job.training.precision}

    def _facts_alike(self) -> dict[str, Any]:
        """What does not change with the layout."""
        return {
            "step": self.applied,
            "tokens": self.tokens,
            "updates": self.optimizer.updates,
            "anomalies": self.watch.state(),
        }

    def _take_facts(self, facts: dict[str, Any], bad_step: int | None = None) -> None:
        self.applied, self.tokens = int(facts["step"]), int(facts["tokens"])
        if bad_step is None:
            self.watch.load_state(facts["anomalies"])
        else:
            self.watch.go_back(facts["anomalies"], bad_step)

    def load(self, folder: Path, bad_step: int | None = None) -> None:
        """Continue from a checkpoint of any layout; after a roll back skip the `bad_step` when it comes again.
        Collective over the world: the weights go round.

        Raises CheckpointError when it is another model's; verify the folder first.
        """
        manifest = read_manifest(folder)
        biases = [key for key in manifest.shapes if key.startswith("buffer/")]
        if biases and not self.job.model.has_router_bias:
            remedy = "set model.router_bias_update_rate, or model.router_bias to true"
            raise CheckpointError(
                f"{folder}: has {biases[0]}, the model has no router bias: {remedy}", tensor=biases[0]
            )
        self.settle()
        load_boxes(folder, self.state() | self._held_alike())
        self._take_facts(manifest.facts, bad_step)
        self.optimizer.updates = int(manifest.facts["updates"])
        self.void()
        self.fill_seconds()
        self.share.weights_due = True
        self._send_weights_due()


def _as_vector(output: ModelOutput) -> Tensor:
    scalars = [output.loss_sum, output.aux_sum, output.z_sum, output.num_tokens, output.num_dropped]
    head = torch.stack([value.detach().to(torch.float64) for value in scalars])
    return torch.cat([head, output.expert_counts_LE.to(torch.float64).flatten()])


def _imbalance(counts: list[float], num_experts: int) -> float:
    """Largest load of an expert over the mean load, averaged over layers; 1 is perfect."""
    layers = [counts[i : i + num_experts] for i in range(0, len(counts), num_experts)]
    ratios = [max(layer) * num_experts / sum(layer) for layer in layers if sum(layer)]
    return sum(ratios) / len(ratios) if ratios else 1.0
