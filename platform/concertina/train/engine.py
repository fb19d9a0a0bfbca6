"""What does one rank compute? A step, a validation, and the boxes of state it owns.

Gradients are of *sums* over tokens and are divided once by the global number of tokens, so neither micro-batches nor
the shares of ranks change the mathematics. One all-reduce a step carries everything ranks must agree on: the norm, the
losses, the acknowledgement of the step before, and the control word.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concertina.config import Job
from concertina.data import IGNORED_TARGET, GlobalSampler, SequenceView, share
from concertina.errors import CheckpointError
from concertina.layout import STAGE, Box, Layout, check_trainable, cut, kv_copies
from concertina.model import Decoder, ModelOutput, Part, Place
from concertina.model.deferred import DeferredGradients
from concertina.parallel.collectives import all_reduce_sum
from concertina.parallel.groups import KV, Groups
from concertina.parallel.reducer import GradientReducer, make_buckets
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import load_boxes
from concertina.state.manifest import read_manifest
from concertina.train.anomaly import Anomaly, AnomalyWatch
from concertina.train.learning_rate import learning_rate
from concertina.train.optimizer import ShardedAdamW

__all__ = ["DTYPES", "Engine", "StepResult"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
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
    """One rank's share of the model on a layout. `configure` may be called again for another generation."""

    def __init__(self, job: Job, train: SequenceView, validation: SequenceView, device: torch.device) -> None:
        self.job = job
        self.train = train
        self.validation = validation
        self.device = device
        self.sampler = GlobalSampler(len(train), job.training.global_batch_size, job.training.seed)
        self.watch = AnomalyWatch(job.training.anomaly)
        self.applied = 0
        self.tokens = 0

    def configure(self, layout: Layout, rank: int, groups: Groups) -> None:
        """Build this rank's part of the model with its initial weights, and everything that reduces over `groups`.

        No collective; the groups must be formed.
        """
        sharers = layout.neighbours_of(rank, kv_copies(self.job.model, layout.tp))
        assert groups[KV].ranks == sharers, "groups were formed for another number of lanes of a key-value head"
        self.layout, self.rank, self.groups = layout, rank, groups
        training = self.job.training
        dtype, sequence_parallel = DTYPES[training.precision], self.job.layout.sequence_parallel
        self.decoder = Decoder(self.job.model, dtype, self.device, groups, training.seed, sequence_parallel)
        self.shards = self.decoder.shards
        parameters: dict[str, Tensor] = dict(self.decoder.named_tensors())
        buckets = make_buckets(parameters, self.shards.values(), groups, training.weight_decay)
        self.deferred = DeferredGradients()  # empty unless a step is computed inside `deferring`
        self.reducer = GradientReducer(buckets, self.deferred.owes)
        self.optimizer = ShardedAdamW(self.reducer.buckets, training)
        optimizer = weakref.proxy(self.optimizer)  # hooks hold nothing that would hold this engine
        for part in self.decoder.modules():
            if isinstance(part, Part) and part.made:
                part.register_forward_pre_hook(lambda part, _: optimizer.arrive(part.made.values()))

    # -- a step ---------------------------------------------------------------------------------------------------

    def train_step(self, step: int, word: int = 0) -> StepResult:
        """Compute and apply step `step` (from 1). Every rank of the world calls it; `word` counts on rank 0 only.

        Raises LayoutError for a layout that can be built and not trained yet.
        """
        check_trainable(self.layout)
        sums = self._forward_backward(step)
        shards = self.reducer.finish()
        head = torch.stack([self.optimizer.local_sum_of_squares(shards), *sums[:5]])
        votes = head.new_tensor([float(self.applied == step - 1), float(word if self.rank == 0 else 0)])
        totals = all_reduce_sum(torch.cat([head, votes, sums[5:]]), self.groups.world).finish().tolist()
        counts = totals[len(_HEAD) :]
        result = self._judge(step, dict(zip(_HEAD, totals, strict=False)), counts)
        if result.anomaly is None:
            # Clipping and the division by the global token count are one factor.
            clip = min(1.0, self.job.training.max_grad_norm / (result.grad_norm + 1e-6))
            self.optimizer.apply(shards, clip / result.tokens, result.learning_rate)
            self.decoder.balance(torch.tensor(counts, dtype=head.dtype).view(-1, self.job.model.num_experts))
        if result.anomaly is None or result.anomaly.action == "skip":
            self.applied = step
            self.tokens += result.tokens
        return result

    def _forward_backward(self, step: int) -> Tensor:
        """Sums over this rank's sequences of a step: loss, aux, z, tokens, choices dropped, then tokens of each layer's
        each expert."""
        total: Tensor | None = None
        batch, me = self.sampler.batch(step - 1), self.groups["dp"].rank
        micro_batches = self._micro_batches(len(batch), self.job.model.capacity.whole_sequences)
        for index, numbers in enumerate(micro_batches):
            self.reducer.arm(last=index == len(micro_batches) - 1)
            ids = [batch[number] for number in numbers[me]]
            first = numbers[me][0] if ids else 0
            output = self._compute(self.train, ids, Place(step, first, tuple(len(theirs) or 1 for theirs in numbers)))
            model = self.job.model
            objective = output.loss_sum
            objective = objective + model.router_aux_loss_coef * output.aux_sum
            objective = objective + model.router_z_loss_coef * output.z_sum
            objective.backward()
            sums = _as_vector(output) if ids else torch.zeros_like(_as_vector(output))
            total = sums if total is None else total + sums
        assert total is not None
        return total

    def _compute(self, view: SequenceView, ids: list[int], place: Place | None = None) -> ModelOutput:
        """Forward of some sequences. A rank without any computes one whose targets are all left out: its losses and
        gradients are exactly zero, and its peers get the exchanges they wait for."""
        tokens, targets = view.read(ids or [0])
        if not ids:
            targets = torch.full_like(targets, IGNORED_TARGET)
        return self.decoder(tokens.to(self.device), targets.to(self.device), place)

    def _micro_batches(self, count: int, whole: int = 1) -> list[list[list[int]]]:
        """The sequences of every rank of dp, by number among `count`, in equally many pieces on every rank: peers of an
        exchange must come along. No piece parts `whole` consecutive ones."""
        shares = [share(range(count), self.layout.dp, index, whole) for index in range(self.layout.dp)]
        largest = len(shares[0])
        count = math.ceil(largest / (self.job.training.micro_batch_size or largest))
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

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the same held-out sequences every time. Collective over the world.

        Dropless, whatever the capacity in training: a sequence's loss does not depend on its neighbours.
        """
        number = min(self.job.training.eval_sequences, len(self.validation))
        chosen = [cut(len(self.validation), number, index)[0] for index in range(number)]
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for numbers in self._micro_batches(number):
            output = self._compute(self.validation, [chosen[n] for n in numbers[self.groups["dp"].rank]])
            total += torch.stack([output.loss_sum.to(total.dtype), output.num_tokens.to(total.dtype)])
        loss, tokens_seen = all_reduce_sum(total, self.groups.world).finish().tolist()
        return loss / tokens_seen

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, BoxedTensor]:
        """The live boxes this rank owns: master weights and both moments of its optimizer shards, and, on the first
        rank of a stage, what all its ranks hold alike."""
        pieces = {
            key: BoxedTensor(view, box, self.shards[key.split("/", 1)[1]].global_shape)
            for key, (box, view) in self.optimizer.pieces().items()
        }
        return pieces | (self._held_alike() if self.groups[STAGE].rank == 0 else {})

    def _held_alike(self) -> dict[str, BoxedTensor]:
        """The routers' biases, whole."""
        shape = (self.job.model.num_experts,)
        biases = self.decoder.router_biases().items()
        return {f"buffer/{name}": BoxedTensor(bias, Box.whole(shape), shape) for name, bias in biases}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must know beside tensors; JSON-able, equal on every rank."""
        return {
            "step": self.applied,
            "tokens": self.tokens,
            "updates": self.optimizer.updates,
            "anomalies": self.watch.state(),
            "layout": self.layout.degrees,
            "precision": self.job.training.precision,
        }

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of any layout. Collective over the world: the weights go round.

        Raises CheckpointError when it is another model's; verify the folder first.
        """
        manifest = read_manifest(folder)
        biases = [key for key in manifest.shapes if key.startswith("buffer/")]
        if biases and not self.job.model.has_router_bias:
            text = f"{folder}: has {biases[0]}, the model has no router bias: set model.router_bias_update_rate"
            raise CheckpointError(text, tensor=biases[0])
        self.settle()
        load_boxes(folder, self.state() | self._held_alike())
        facts = manifest.facts
        self.applied, self.tokens = int(facts["step"]), int(facts["tokens"])
        self.optimizer.updates = int(facts["updates"])
        self.watch.load_state(facts["anomalies"])
        self.optimizer.publish()


def _as_vector(output: ModelOutput) -> Tensor:
    scalars = [output.loss_sum, output.aux_sum, output.z_sum, output.num_tokens, output.num_dropped]
    head = torch.stack([value.detach().to(torch.float64) for value in scalars])
    return torch.cat([head, output.expert_counts_LE.to(torch.float64).flatten()])


def _imbalance(counts: list[float], num_experts: int) -> float:
    """Largest load of an expert over the mean load, averaged over layers; 1 is perfect."""
    layers = [counts[i : i + num_experts] for i in range(0, len(counts), num_experts)]
    ratios = [max(layer) * num_experts / sum(layer) for layer in layers if sum(layer)]
    return sum(ratios) / len(ratios) if ratios else 1.0
