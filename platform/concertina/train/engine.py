"""What does one rank compute? A step, a validation, and the boxes of state it owns.

Gradients are of *sums* over tokens and are divided once by the global number of tokens, so neither micro-batches nor
the shares of ranks change the mathematics. One all-reduce a step carries everything ranks must agree on: the norm, the
losses, the acknowledgement of the step before, and the control word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concertina.config import Job
from concertina.data import IGNORED_TARGET, GlobalSampler, SequenceView, share
from concertina.layout import Axis, Layout, cut
from concertina.model import Decoder, ModelOutput
from concertina.model.deferred import DeferredGradients
from concertina.parallel.collectives import all_reduce_sum
from concertina.parallel.groups import Groups
from concertina.parallel.reducer import GradientReducer, make_buckets
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import load_boxes
from concertina.state.manifest import read_manifest
from concertina.train.anomaly import Anomaly, AnomalyWatch
from concertina.train.learning_rate import learning_rate
from concertina.train.optimizer import ShardedAdamW

__all__ = ["DTYPES", "Engine", "StepResult"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
_HEAD = ("sum_of_squares", "loss", "aux_loss", "z_loss", "tokens", "acknowledged", "word")


@dataclass(frozen=True)
class StepResult:
    """One applied step, equal on every rank. Losses are means over the global batch's `tokens`."""

    step: int
    loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    imbalance: float
    word: int
    acknowledged: bool
    anomaly: Anomaly | None

    def metrics(self) -> dict[str, float]:
        """What is tracked of a committed step."""
        names = ("loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens", "imbalance")
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

    # -- a step ---------------------------------------------------------------------------------------------------

    def train_step(self, step: int, word: int = 0) -> StepResult:
        """Compute and apply step `step` (from 1). Every rank of the world calls it; `word` counts on rank 0 only."""
        sums = self._forward_backward(self.sampler.batch(step - 1))
        shards = self.reducer.finish()
        head = torch.stack([self.optimizer.local_sum_of_squares(shards), *sums[:4]])
        votes = head.new_tensor([float(self.applied == step - 1), float(word if self.rank == 0 else 0)])
        totals = all_reduce_sum(torch.cat([head, votes, sums[4:]]), self.groups.world).finish().tolist()
        result = self._judge(step, dict(zip(_HEAD, totals, strict=False)), totals[len(_HEAD) :])
        if result.anomaly is None:
            # Clipping and the division by the global token count are one factor.
            clip = min(1.0, self.job.training.max_grad_norm / (result.grad_norm + 1e-6))
            self.optimizer.apply(shards, clip / result.tokens, result.learning_rate)
        if result.anomaly is None or result.anomaly.action == "skip":
            self.applied = step
            self.tokens += result.tokens
        return result

    def _forward_backward(self, batch: list[int]) -> Tensor:
        """Sums over this rank's sequences: loss, aux, z, tokens, then tokens of every layer's every expert."""
        total: Tensor | None = None
        micro_batches = self._micro_batches(batch)
        for index, ids in enumerate(micro_batches):
            self.reducer.arm(last=index == len(micro_batches) - 1)
            output = self._compute(self.train, ids)
            model = self.job.model
            objective = output.loss_sum
            objective = objective + model.router_aux_loss_coef * output.aux_sum
            objective = objective + model.router_z_loss_coef * output.z_sum
            objective.backward()
            sums = _as_vector(output) if ids else torch.zeros_like(_as_vector(output))
            total = sums if total is None else total + sums
        assert total is not None
        return total

    def _compute(self, view: SequenceView, ids: list[int]) -> ModelOutput:
        """Forward of some sequences. A rank without any computes one whose targets are all left out: its losses and
        gradients are exactly zero, and its peers get the exchanges they wait for."""
        tokens, targets = view.read(ids or [0])
        if not ids:
            targets = torch.full_like(targets, IGNORED_TARGET)
        return self.decoder(tokens.to(self.device), targets.to(self.device))

    def _micro_batches(self, batch: list[int]) -> list[list[int]]:
        """This rank's sequences in equally many pieces on every rank: peers of an exchange must come along."""
        parts, index = self.layout.dp, self.groups["dp"].rank
        mine = share(batch, parts, index)
        largest = cut(len(batch), parts, 0)[1]
        count = math.ceil(largest / (self.job.training.micro_batch_size or largest))
        return [share(mine, count, piece) for piece in range(count)]

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
            word=int(totals["word"]),
            acknowledged=totals["acknowledged"] == self.layout.world,
            anomaly=self.watch.judge(step, loss, norm),
        )

    def confirm(self) -> bool:
        """Whether every rank has applied the step this one has: commits the last step. Collective over the world."""
        applied = torch.tensor([1.0, float(self.applied)], dtype=torch.float64, device=self.device)
        ranks, total = all_reduce_sum(applied, self.groups.world).finish().tolist()
        return total == ranks * self.applied

    # -- validation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the same held-out sequences every time. Collective over the world."""
        number = min(self.job.training.eval_sequences, len(self.validation))
        chosen = [cut(len(self.validation), number, index)[0] for index in range(number)]
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for ids in self._micro_batches(chosen):
            output = self._compute(self.validation, ids)
            total += torch.stack([output.loss_sum.to(total.dtype), output.num_tokens.to(total.dtype)])
        loss, tokens_seen = all_reduce_sum(total, self.groups.world).finish().tolist()
        return loss / tokens_seen

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, BoxedTensor]:
        """The live boxes this rank owns: master weights and both moments of its optimizer shards."""
        return {
            key: BoxedTensor(view, box, self.shards[key.split("/", 1)[1]].global_shape)
            for key, (box, view) in self.optimizer.pieces().items()
        }

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must know beside tensors; JSON-able, equal on every rank."""
        layout = self.layout
        return {
            "step": self.applied,
            "tokens": self.tokens,
            "updates": self.optimizer.updates,
            "anomalies": self.watch.state(),
            "layout": {"world": layout.world, **{axis.value: layout.degree(axis) for axis in Axis}},
            "precision": self.job.training.precision,
        }

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of any layout. Collective over the world: the weights go round.

        Raises CheckpointError when it is another model's; verify the folder first.
        """
        facts = read_manifest(folder).facts
        load_boxes(folder, self.state())
        self.applied, self.tokens = int(facts["step"]), int(facts["tokens"])
        self.optimizer.updates = int(facts["updates"])
        self.watch.load_state(facts["anomalies"])
        self.optimizer.publish()


def _as_vector(output: ModelOutput) -> Tensor:
    scalars = [output.loss_sum, output.aux_sum, output.z_sum, output.num_tokens]
    head = torch.stack([value.detach().to(torch.float64) for value in scalars])
    return torch.cat([head, output.expert_counts_LE.to(torch.float64).flatten()])


def _imbalance(counts: list[float], num_experts: int) -> float:
    """Largest load of an expert over the mean load, averaged over layers; 1 is perfect."""
    layers = [counts[i : i + num_experts] for i in range(0, len(counts), num_experts)]
    ratios = [max(layer) * num_experts / sum(layer) for layer in layers if sum(layer)]
    return sum(ratios) / len(ratios) if ratios else 1.0
