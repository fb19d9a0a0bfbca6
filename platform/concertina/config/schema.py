"""What may stand in a job file: one frozen model a section, bounds in the types, the unit and reason under each key.

Keys of `model` are Hugging Face's where Hugging Face has one.
"""

from __future__ import annotations

import math
from fractions import Fraction as Exact
from typing import Annotated, Literal

from pydantic import Field, model_validator

from concertina.config.data import DataConfig, SourceConfig, TokenizerConfig
from concertina.config.model_misfits import model_misfits
from concertina.config.section import Fraction, Misfits, NonNegative, Positive, Section

__all__ = [
    "AnomalyConfig",
    "CapacityConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "ElasticConfig",
    "Job",
    "LayoutConfig",
    "ModelConfig",
    "Precision",
    "RopeScalingConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainingConfig",
]

Precision = Literal["float64", "float32", "bfloat16"]
Recomputed = Literal["norm", "activation", "permute", "core", "experts", "attention", "moe", "mlp"]
_CHEAP: tuple[Recomputed, ...] = ("norm", "activation", "permute")
AnomalyAction = Literal["skip", "stop", "roll_back"]


class CapacityConfig(Section):
    """How many tokens an expert takes; what is chosen beyond that is dropped, and the weights of the rest stay."""

    factor: Annotated[float, Field(gt=0)] | None = None
    """Capacity of an expert over its even share of the choices; absent: nothing is dropped."""
    priority: Literal["probability", "position"] = "probability"
    """Whom a full expert keeps: the largest scores, or the earliest tokens (cheaper, but blind to what it drops)."""
    group_sequences: Positive = 1
    """Consecutive sequences of the global batch over which capacity is counted; no rank or micro-batch parts them."""
    scope: Literal["group", "sub_sequence"] = "group"
    """`group`: the same drops under every layout; `sub_sequence`: over the tokens that a rank holds of a micro-batch,
    without communication, but what is dropped depends on the layout."""
    pad: bool = False
    """Every expert's rows are filled up to what its capacity allows: shapes never change, and no rank waits to learn
    them; costs computation on empty rows."""

    @property
    def whole_sequences(self) -> int:
        """How many consecutive sequences ranks and micro-batches must hold together."""
        return self.group_sequences if self.factor is not None and self.scope == "group" else 1


class RopeScalingConfig(Section):
    """YaRN: rotary frequencies stretched, so that a model trained on short sequences reads longer ones."""

    factor: Annotated[float, Field(ge=1)] = 1.0
    """How many times longer; 1: nothing is stretched."""
    original_max_position_embeddings: Positive = 4096
    """Longest sequence before, in tokens."""
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    """A frequency that turns so often over that length stays as it is."""
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    """One that turns so often or less is divided by `factor`; between the two it is mixed."""
    mscale: Annotated[float, Field(ge=0)] = 0.0
    """Growth of queries and keys with log(factor) over that of mscale_all_dim; 0: neither counts, it is 1."""
    mscale_all_dim: Annotated[float, Field(ge=0)] = 0.0
    """With latent attention: growth of its scores with log(factor), squared (DeepSeek); 0: none."""


class ModelConfig(Section):
    """The decoder's shape."""

    vocab_size: Positive = 4096
    """Rows of the embedding; at least the tokenizer's size."""
    hidden_size: Positive = 256
    """Width of the residual stream."""
    num_hidden_layers: Positive = 4
    """Decoder layers."""
    num_attention_heads: Positive = 8
    """Query heads."""
    num_key_value_heads: Positive = 4
    """Key and value heads; divides num_attention_heads (grouped-query attention)."""
    head_dim: Positive | None = None
    """Width of a head; hidden_size / num_attention_heads when absent."""
    max_position_embeddings: Positive = 2048
    """Longest sequence, in tokens."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square in RMSNorm."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = False
    """Output head shares the embedding's weight."""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm on queries and keys: over each head (Qwen3) or over all heads at once (OLMoE)."""
    clip_qkv: Annotated[float, Field(gt=0)] | None = None
    """Clamp of query, key and value projections (OLMoE)."""
    kv_lora_rank: NonNegative = 0
    """Width that keys and values of all heads are made from: multi-head latent attention (DeepSeek); 0: there is none,
    and none of the five keys that follow."""
    q_lora_rank: NonNegative = 0
    """The same for queries; 0: they are made from the hidden state."""
    qk_nope_head_dim: NonNegative = 0
    """Part of a head's query and key that is not rotated."""
    qk_rope_head_dim: NonNegative = 0
    """Part that is; all heads share the key's."""
    v_head_dim: NonNegative = 0
    """Width of a head's value."""
    rope_interleave: bool = False
    """Rotary pairs lie side by side in the projections' rows (as DeepSeek publishes them), not a half apart."""
    intermediate_size: Positive = 512
    """Width of a dense layer's SwiGLU; only layers in mlp_only_layers use it."""
    mlp_only_layers: tuple[NonNegative, ...] = ()
    """Layers with a dense MLP instead of experts."""
    num_experts: Positive = 8
    """Routed experts of a layer."""
    num_experts_per_tok: Positive = 2
    """Experts a token goes to (top-k)."""
    moe_intermediate_size: Positive = 512
    """Width of one routed expert's SwiGLU."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores: over all experts, or each expert's alone (DeepSeek-V3)."""
    norm_topk_prob: bool = True
    """The k chosen scores are divided by their sum."""
    routed_scaling_factor: Annotated[float, Field(gt=0)] = 1.0
    """What the routed experts' weights are multiplied by, after norm_topk_prob (DeepSeek)."""
    n_group: Positive = 1
    """Groups of neighbouring experts, a divisor of num_experts; a token goes to experts of its topk_group best groups
    only. A group is as good as its best expert with softmax (DeepSeek-V2), as its two best together with sigmoid
    (DeepSeek-V3)."""
    topk_group: Positive = 1
    """Groups a token may use; as many as n_group: no limit."""
    router_bias_update_rate: Annotated[float, Field(ge=0)] = 0.0
    """What an expert's bias moves by after a step, up when it had fewer tokens than the mean, down when more; the bias
    counts in the choice of experts only (balancing without a loss, DeepSeek-V3: 0.001). 0: it stays as it is."""
    router_bias: bool | None = None
    """Whether there is that bias; absent: where it moves. true without a rate: an imported one is used, not moved."""
    router_noise: bool = False
    """Noise of a learned size on the router's logits in training (Shazeer 2017)."""
    shared_expert_intermediate_size: NonNegative = 0
    """Width of the expert every token goes to; 0 for none."""
    shared_expert_gate: bool = False
    """A sigmoid gate on the shared expert (Qwen2-MoE)."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load-balancing loss, per packed sequence and layer; 0 switches it off."""
    router_z_loss_coef: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the squared log-sum-exp of the router's logits; 0 switches it off."""
    capacity: CapacityConfig = CapacityConfig()

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if problems := model_misfits(self):
            raise Misfits(problems)
        return self

    @property
    def width_of_head(self) -> int:
        """Width of one head's query and key, given or derived."""
        if self.kv_lora_rank:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def width_of_value(self) -> int:
        """Width of one head's value."""
        return self.v_head_dim if self.kv_lora_rank else self.width_of_head

    @property
    def width_of_rotation(self) -> int:
        """The part of a head that is rotated."""
        return self.qk_rope_head_dim if self.kv_lora_rank else self.width_of_head

    def expert_capacity(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens an expert takes: ceil(factor * tokens * k / E), never more than there are.

        There must be a factor.
        """
        assert self.capacity.factor is not None
        # The factor as it is written: in floats, 1.1 times 10 is more than 11.
        even_share = Exact(num_tokens * self.num_experts_per_tok, self.num_experts)
        return min(num_tokens, math.ceil(Exact(repr(self.capacity.factor)) * even_share))

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has experts."""
        return layer not in self.mlp_only_layers

    @property
    def has_router_bias(self) -> bool:
        """Whether the choice of experts is biased towards those that had too few tokens."""
        return self.router_bias_update_rate > 0 if self.router_bias is None else self.router_bias


class AnomalyConfig(Section):
    """What happens at a step whose loss or gradient is not finite, or whose loss jumps."""

    nonfinite: AnomalyAction = "skip"
    """`skip` leaves the weights as they were, `stop` ends the run, `roll_back` goes to the last checkpoint and
    then skips that step."""
    spike: AnomalyAction = "skip"
    """The same for a loss above `spike_factor` times the mean of the last 32 steps."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """Absent: spikes are not looked for."""
    max_events: Positive = 10
    """After so many anomalies the run stops."""


class TrainingConfig(Section):
    """Steps, batch, optimizer, precision."""

    steps: Positive = 200
    """Optimizer steps."""
    global_batch_size: Positive = 16
    """Sequences a step, whatever the world."""
    micro_batch_size: Positive | None = None
    """Sequences a rank computes at once; absent: all of its share, on pipeline stages one (or a capacity group)."""
    precision: Precision = "float32"
    """Of weights and activations; `bfloat16` keeps fp32 master weights, `float64` exists for equality tests."""
    activation_checkpointing: Literal["none", "selective", "full"] | tuple[Recomputed, ...] = "none"
    """What the backward computes again rather than finds in memory. `full`: every layer, of which the input alone is
    kept, for a third more computation; `selective`: what no product is done twice for, [norm, activation, permute]; or
    a list of: `norm` (their outputs), `activation` (SwiGLU's products), `permute` (rows sorted by expert, where they
    need not travel), `core` (inside attention: rotated heads, on a CPU probabilities), `experts` (their products),
    `attention`, `moe`, `mlp` (halves of layers: with experts, dense)."""
    seed: NonNegative = 0
    """Of the initial weights and the order of the data."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak of the schedule."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    """End of the cosine."""
    warmup_steps: NonNegative = 20
    """Linear from 0 to the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled (AdamW); on matrices, not on norms and biases."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Global-norm clipping."""
    log_every_steps: Positive = 10
    """Steps between progress lines."""
    eval_every_steps: Positive = 50
    """Steps between validations; the last step is always validated."""
    eval_sequences: Positive = 64
    """Held-out sequences a validation reads, the same ones each time; of a mixture as many of each source."""
    anomaly: AnomalyConfig = AnomalyConfig()

    @property
    def recomputed(self) -> frozenset[str]:
        """The kinds of `activation_checkpointing`; `layer` is all of one."""
        chosen = self.activation_checkpointing
        if isinstance(chosen, tuple):
            return frozenset(chosen)
        return frozenset({"none": (), "selective": _CHEAP, "full": ("layer",)}[chosen])

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        low, high = self.min_learning_rate, self.learning_rate
        if low > high:
            text = f"min_learning_rate={low:g} is more than learning_rate={high:g}: set it to {high:g} or less"
            raise Misfits([("min_learning_rate", text)])
        return self


class LayoutConfig(Section):
    """Degrees of the two grids; dp and edp follow from the world."""

    pp: Positive = 1
    """Pipeline stages, shared by both grids."""
    cp: Positive = 1
    """Context parallel: chunks of a sequence."""
    tp: Positive = 1
    """Tensor parallel of attention."""
    ep: Positive = 1
    """Expert parallel: groups the experts are spread over."""
    etp: Positive = 1
    """Tensor parallel inside an expert."""
    sequence_parallel: bool = True
    """Between tensor-parallel products each lane of tp keeps its share of the tokens; false: every lane has all of
    them, and sends them all to the experts."""
    context_exchange: Literal["auto", "gather", "ring"] = "auto"
    """How keys and values get to the other ranks of cp: all at once, or from neighbour to neighbour, with no more than
    three pieces on a rank; `auto`: in a ring for sequences of 32,768 tokens and more."""

    virtual_stages: Positive = 1
    """Pieces of the model on each pipeline stage; more than one are interleaved: a smaller bubble for more messages."""
    stage_layers: tuple[Positive, ...] | None = None
    """Layers of each of the pp * virtual_stages pieces of the model; absent: as even as can be."""

    @property
    def degrees(self) -> dict[str, int]:
        """Those that are given, by axis."""
        return {axis: getattr(self, axis) for axis in ("pp", "cp", "tp", "ep", "etp")}


class ClusterConfig(Section):
    """The machines a run asks for."""

    num_workers: Positive = 4
    """Ranks, one process each."""
    num_nodes: Positive = 2
    """Ray nodes of the cluster that `concertina train` starts when none is given by --address."""
    device: Literal["auto", "cpu", "cuda", "timed"] = "auto"
    """`auto`: cuda (backend nccl) where Ray has GPUs, else cpu (gloo). `timed`: ranks on CPUs that wait instead of
    computing, for measuring what is between computations; all that such a run says is marked *emulated compute*."""
    timed_s_per_token: Annotated[float, Field(gt=0)] = 1e-5
    """Seconds that one rank alone takes for one token in one layer with experts, forward; the backward takes twice as
    long, dense layers and the head in proportion. 1e-5 leaves the rest of a small model's step well below."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """Logical CPUs a rank reserves in Ray."""
    threads_per_worker: Positive = 1
    """Compute threads of a rank on the CPU."""
    capacity_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long a run waits for machines before it gives up (exit 104)."""

    @model_validator(mode="after")
    def _fits(self) -> ClusterConfig:
        nodes, workers = self.num_nodes, self.num_workers
        if nodes > workers:
            text = f"num_nodes={nodes} is more than num_workers={workers}: a node needs at least one rank"
            raise Misfits([("num_nodes", text)])
        return self


class ElasticConfig(Section):
    """What a run does when machines come and go."""

    min_workers: Positive = 1
    """Ranks below which the run pauses until there are more; 1: it goes on with what is left."""
    spares: NonNegative = 0
    """Members beyond cluster.num_workers that are kept hot: started, connected, without a rank. They cost as much as
    ranks do, so there are none unless asked for."""
    standbys_per_node: NonNegative = 0
    """Processes kept ready on each node, imported and connected, which take the room of one that dies there at once:
    each costs its memory, and no CPU or GPU. Of use on CPUs only, so far: on a GPU there is none in them yet."""
    rejoin_after_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds for which a node in quarantine is given no member: longer than a node takes that restarts in a loop."""
    max_losses_per_node: Positive = 3
    """Losses of members on one node after which it is put in quarantine; one or two may be bad luck."""
    notices: Literal["auto", "none", "aws", "gcp", "azure"] = "auto"
    """Whose metadata service each node asks once a second whether it will be taken back; auto: that of the cloud which
    its firmware names, nobody's elsewhere. What Ray drains (`ray drain-node`, SIGTERM to `ray start`) it knows anyway.
    """
    notice_endpoint: Annotated[str, Field(pattern=r"^https?://[^/]+$")] | None = None
    """Where it answers, such as http://10.0.0.1:8080; absent: where the cloud has it."""
    verify_every_steps: NonNegative = 0
    """Steps between two looks at whether copies that must be equal are: weights of replicas, optimizer shards of both
    owners. A rank whose weights are wrong goes, and the step is not applied; with 1 no wrong one ever is. It costs a
    pass over this rank's weights and state; 0: never."""
    stragglers: Literal["report", "act", "ignore"] = "report"
    """Members that compute slower than their like by a fifth or more. report: says so; act: a spare replaces one, or it
    gets fewer sequences, or the others go on without it, whichever makes steps shorter, which is measured."""
    usd_per_node_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of a node in US dollars an hour, for the ledger; absent: nothing is said of money."""


class CheckpointConfig(Section):
    """Durable checkpoints."""

    every_steps: Positive = 100
    """Steps between checkpoints; the last step and a stop always write one."""
    keep: Positive = 3
    """Newest complete checkpoints kept."""
    initial_load_path: str | None = None
    """What a new run takes its weights from, to fine-tune them: a checkpoint's folder, or a run (its id, its folder,
    `latest`), of which the newest checkpoint is meant. Weights and router biases only: steps, schedule, moments and the
    order of data begin anew. As in torchtitan, from where the name is, it counts until the run has a checkpoint of its
    own; a run goes on with --resume (what `resume_from_checkpoint` is elsewhere)."""


class TrackingConfig(Section):
    """MLflow."""

    tracking_uri: str | None = None
    """Absent: MLFLOW_TRACKING_URI, else sqlite under storage_path."""
    experiment_name: str = "concertina"
    """MLflow experiment."""


class Job(Section):
    """One job file."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9_.-]{0,38}[a-z0-9])?$")]
    """Prefix of run ids: up to 40 of a-z 0-9 . _ -, a letter or digit at both ends."""
    storage_path: str = "runs"
    """Folder of runs: logs, events, checkpoints, the MLflow database."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    layout: LayoutConfig = LayoutConfig()
    cluster: ClusterConfig = ClusterConfig()
    elastic: ElasticConfig = ElasticConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def emulates_compute(self) -> bool:
        """Whether ranks only wait where others compute."""
        return self.cluster.device == "timed"

    @model_validator(mode="after")
    def _fits(self) -> Job:
        problems = []
        length, longest = self.data.sequence_length, self.model.max_position_embeddings
        if length > longest:
            text = f"sequence_length={length} is more than model.max_position_embeddings={longest}"
            problems.append(("data.sequence_length", text))
        words, rows = self.data.tokenizer.vocab_size, self.model.vocab_size
        if self.data.tokenizer.path is None and words > rows:
            text = f"vocab_size={words} is more than model.vocab_size={rows}: the embedding would lack rows"
            problems.append(("data.tokenizer.vocab_size", text))
        least, most = self.elastic.min_workers, self.cluster.num_workers
        if least > most:
            text = f"min_workers={least} is more than cluster.num_workers={most}: set it to {most} or less"
            problems.append(("elastic.min_workers", text))
        if problems:
            raise Misfits(problems)
        return self
