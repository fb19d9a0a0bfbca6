"""Do files, what they extend and overrides make the job a person meant, and is every error found at once?"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from concertina.config import Job, load_job, read_job
from concertina.errors import ConfigError

LATENT = "num_key_value_heads: 8, kv_lora_rank: 8, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8"

pytestmark = pytest.mark.unit


def written(folder: Path, **files: str) -> Path:
    """`files` as YAML in `folder`; the path of the first."""
    for stem, text in files.items():
        (folder / f"{stem}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def problems(path: Path | str, overrides: Sequence[str] = ()) -> list[str]:
    """The lines of the refusal, folders left out."""
    with pytest.raises(ConfigError) as caught:
        load_job(path, overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value).splitlines() == caught.value.data["problems"]
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.data == caught.value.data
    folder = f"{Path(path).parent}/"
    return [line.replace(folder, "") for line in caught.value.data["problems"]]


def test_a_small_file(tmp_path: Path) -> None:
    job = load_job(written(tmp_path, a="name: a\ntraining: {learning_rate: 1e-3, steps: 2e2}\n"))
    assert job.training.learning_rate == 1e-3
    assert job.training.steps == 200
    assert job.model == Job(name="a").model


def test_every_error_at_once_with_line_and_hint(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        x="""\
name: Bad_
trainin: {steps: 3}
model:
  vocab_siz: 3
  hidden_size: 1e-4
  tie_word_embeddings: no
  qk_norm: heads
  mlp_only_layers: [0, x]
data:
  source: 12
  tokenizer:
training:
  stepz: 4
  warmup_steps: -1
  num_workers: 3
  learning_rate: on
  learning_rate: fast
layout: 4
""",
    )
    assert problems(path, ["training.seed=true", "foo", "layouts.x=1"]) == [
        "--set: foo: expected key=value, such as training.steps=50",
        "--set: training.seed: expected a whole number, got true",
        "--set: layouts: unknown key, did you mean layout?",
        "x.yaml:1: name: 'Bad_' is no name: up to 40 of a-z 0-9 . _ -, a letter or digit at both ends",
        "x.yaml:2: trainin: unknown key, did you mean training?",
        "x.yaml:4: model.vocab_siz: unknown key, did you mean model.vocab_size?",
        "x.yaml:5: model.hidden_size: expected a whole number, got 0.0001",
        "x.yaml:6: model.tie_word_embeddings: expected true or false, got 'no'",
        "x.yaml:7: model.qk_norm: expected none, head or full, got 'heads', did you mean head?",
        "x.yaml:8: model.mlp_only_layers: expected a whole number, got 'x'",
        "x.yaml:10: data.source: expected text (in quotes if it looks like a number), got 12",
        "x.yaml:11: data.tokenizer: expected keys below it, got nothing",
        "x.yaml:13: training.stepz: unknown key, did you mean training.steps?",
        "x.yaml:14: training.warmup_steps: -1 is too small, must be at least 0",
        "x.yaml:15: training.num_workers: unknown key, did you mean cluster.num_workers?",
        "x.yaml:17: training.learning_rate: given twice, first at x.yaml:16",
        "x.yaml:17: training.learning_rate: expected a number, got 'fast'",
        "x.yaml:18: layout: expected keys below it, got 4",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("training: {steps: 4}", "x.yaml:1: name: missing"),
        ("name: x\nfoo: 1", "x.yaml:2: foo: unknown key, known here: schema_version, name, storage_path, model"),
        ("name: x\nschema_version: 2", "x.yaml:2: schema_version: expected 1, got 2"),
        ("name: x\nmodel:\n  num_key_value_heads: 3", "x.yaml:3: model.num_key_value_heads: num_key_value_heads=3"),
        ("name: x\nmodel: {hidden_size: 100, num_attention_heads: 8}", "x.yaml:2: model.num_attention_heads: num_"),
        ("name: x\nmodel: {head_dim: 33}", "x.yaml:2: model.head_dim: a head is 33 wide, must be even"),
        ("name: x\nmodel: {num_experts: 1}", "x.yaml:2: model.num_experts_per_tok: num_experts_per_tok=2 is more"),
        ("name: x\nmodel: {n_group: 3}", "x.yaml:2: model.n_group: n_group=3 must divide num_experts=8"),
        ("name: x\nmodel: {n_group: 4, topk_group: 5}", "x.yaml:2: model.topk_group: topk_group=5 is more than n_gr"),
        ("name: x\nmodel: {n_group: 8}", "x.yaml:2: model.topk_group: topk_group=1 leaves a token 1 of 8 experts, num"),
        ("name: x\nmodel: {scoring_func: sigmod}", "x.yaml:2: model.scoring_func: expected softmax or sigmoid, got"),
        ("name: x\nmodel: {router_bias_update_rate: -1}", "x.yaml:2: model.router_bias_update_rate: -1 is too small"),
        ("name: x\nmodel: {mlp_only_layers: [4]}", "x.yaml:2: model.mlp_only_layers: [4] are beyond the last layer, 3"),
        ("name: x\nmodel: {v_head_dim: 8}", "x.yaml:2: model.v_head_dim: v_head_dim=8 means nothing without latent"),
        (
            f"name: x\nmodel: {{{LATENT.replace('heads: 8', 'heads: 4')}}}",
            "x.yaml:2: model.num_key_value_heads: num_key_value",
        ),
        (
            f"name: x\nmodel: {{{LATENT.replace('v_head_dim: 8', 'v_head_dim: 0')}}}",
            "x.yaml:2: model.v_head_dim: v_head_dim is missing: latent",
        ),
        (
            f"name: x\nmodel: {{{LATENT.replace('qk_rope_head_dim: 8', 'qk_rope_head_dim: 5')}}}",
            "x.yaml:2: model.qk_rope_head_dim: qk_rope_head_dim=5",
        ),
        (f"name: x\nmodel: {{{LATENT}, qk_norm: head}}", "x.yaml:2: model.qk_norm: qk_norm=head does not go with"),
        (
            "name: x\nmodel: {router_bias: false, router_bias_update_rate: 0.1}",
            "x.yaml:2: model.router_bias: router_bias_update_rate=0.1 moves a bias, router_bias=false",
        ),
        ("name: x\nmodel: {shared_expert_gate: true}", "x.yaml:2: model.shared_expert_gate: there is no shared"),
        (
            "name: x\nmodel:\n  capacity: {pad: true}",
            "x.yaml:3: model.capacity.pad: nothing is dropped without a capacity",
        ),
        (
            "name: x\nmodel:\n  capacity: {factor: 1, scope: sub_sequence, group_sequences: 2}",
            "x.yaml:3: model.capacity.group_sequences: group_sequences=2 means nothing to scope=sub_sequence",
        ),
        ("name: x\nmodel: {capacity: {factor: 0}}", "x.yaml:2: model.capacity.factor: 0 is too small, must be more"),
        ("name: x\ntraining: {min_learning_rate: 1}", "x.yaml:2: training.min_learning_rate: min_learning_rate=1 is"),
        ("name: x\ncluster: {num_nodes: 5}", "x.yaml:2: cluster.num_nodes: num_nodes=5 is more than num_workers=4"),
        ("name: x\nelastic: {min_workers: 5}", "x.yaml:2: elastic.min_workers: min_workers=5 is more than cluster.num"),
        ("name: x\nelastic: {usd_per_node_hour: -1}", "x.yaml:2: elastic.usd_per_node_hour: -1 is too small"),
        ("name: x\nelastic: {spares: -1}", "x.yaml:2: elastic.spares: -1 is too small"),
        ("name: x\nelastic: {max_losses_per_node: 0}", "x.yaml:2: elastic.max_losses_per_node: 0 is too small"),
        ("name: x\ndata: {sequence_length: 4096}", "x.yaml:2: data.sequence_length: sequence_length=4096 is more"),
        ("name: x\nmodel: {vocab_size: 300}", "x.yaml:1: data.tokenizer.vocab_size: vocab_size=4096 is more than"),
        ("name: x\ntraining: {learning_rate: .inf}", "x.yaml:2: training.learning_rate: expected a finite number"),
        ("name: x\ntraining: {steps: 2.5}", "x.yaml:2: training.steps: expected a whole number, got 2.5"),
        ("name: x\ntraining: {steps: '5'}", "x.yaml:2: training.steps: expected a whole number, got '5'"),
        (
            "name: x\ntraining: {activation_checkpointing: [norm, expert]}",
            "x.yaml:2: training.activation_checkpointing: expected norm, activation, permute, core, experts, "
            "attention, moe or mlp, got 'expert', did you mean experts?",
        ),
        (
            "name: x\ntraining:\n  activation_checkpointing: selectiv",
            "x.yaml:3: training.activation_checkpointing: expected none, selective or full, got 'selectiv', did",
        ),
        ("name: x\ntraining: {adam_beta1: 1}", "x.yaml:2: training.adam_beta1: 1 is too large, must be less than 1"),
        ("- 1", "x.yaml:1: a job file holds keys"),
        ("", "x.yaml:1: a job file holds keys"),
        ("name: x\n  y: z", "x.yaml:2: not YAML: mapping values are not allowed here"),
    ],
)
def test_one_error(tmp_path: Path, text: str, line: str) -> None:
    found = problems(written(tmp_path, x=text))
    assert len(found) == 1
    assert found[0].startswith(line)


def test_overrides_come_last_and_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, a="name: a\ntraining: {steps: 10, seed: 3}\n")
    job = load_job(
        path,
        ["training.steps=20", "training.steps=1e3", "layout={ep: 2}", "layout.tp=2", "training.micro_batch_size="],
    )
    assert (job.training.steps, job.training.seed) == (1000, 3)
    assert (job.layout.ep, job.layout.tp) == (2, 2)
    assert job.training.micro_batch_size is None
    assert load_job(path, ["name=b"]).name == "b"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.stepz=5", "--set: training.stepz: unknown key, did you mean training.steps?"),
        ("training.steps=[", "--set: training.steps: not YAML: while parsing a flow node"),
        ("training.steps.x=1", "--set: training.steps: expected a whole number, got keys (x)"),
        ("training", "--set: training: expected key=value, such as training.steps=50"),
        ("=5", "--set: =5: expected key=value, such as training.steps=50"),
        ("training=5", "--set: training: expected keys below it, got 5"),
        ("extends=other", "--set: extends: unknown key"),
    ],
)
def test_errors_of_overrides_name_them(tmp_path: Path, override: str, line: str) -> None:
    found = problems(written(tmp_path, a="name: a\n"), [override])
    assert len(found) == 1
    assert found[0].startswith(line)


def test_extends_merges_key_by_key_and_keeps_places(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        child="extends: parent.yaml\nname: child\ntraining:\n  steps: 5\n  stepz: 1\n",
        parent="extends: grandparent\nname: parent\ntraining:\n  seed: 7\n  sead: 8\n",
        grandparent="name: grandparent\ntraining: {steps: 1, warmup_steps: 2, seed: 1}\nlayout: {ep: 0}\n",
    )
    assert problems(path) == [
        "child.yaml:5: training.stepz: unknown key, did you mean training.steps?",
        "grandparent.yaml:3: layout.ep: 0 is too small, must be at least 1",
        "parent.yaml:5: training.sead: unknown key, did you mean training.seed?",
    ]
    path.write_text(path.read_text().replace("  stepz: 1\n", ""))
    (tmp_path / "parent.yaml").write_text("extends: grandparent\nname: parent\ntraining: {seed: 7}\n")
    job = load_job(path, ["layout.ep=4"])
    assert (job.name, job.training.steps, job.training.seed, job.training.warmup_steps) == ("child", 5, 7, 2)


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, a="extends: b\nname: a\n", b="name: b\nextends: a.yaml\n")
    assert problems(path) == ["b.yaml:2: extends: goes in a circle: a.yaml -> b.yaml -> a.yaml"]
    path = written(tmp_path, me="extends: me\nname: me\n")
    assert problems(path) == ["me.yaml:1: extends: goes in a circle: me.yaml -> me.yaml"]


def test_extends_nothing_there(tmp_path: Path) -> None:
    path = written(tmp_path, a="name: a\nextends: nowhere.yaml\n")
    assert problems(path)[0].startswith("a.yaml:2: extends: nowhere.yaml: no such job file; named jobs: ")
    path = written(tmp_path, a="name: a\nextends: [b, c]\n")
    assert problems(path) == ["a.yaml:2: extends: expected one file or the name of a job"]


def test_a_name_is_looked_up_on_the_shelf(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    written(shelf, big="name: big\ntraining: {steps: 9}\n")
    assert load_job("big", shelf=shelf).name == "big"
    path = written(tmp_path, small="extends: big\nname: small\n")
    assert load_job(path, shelf=shelf).training.steps == 9
    with pytest.raises(ConfigError, match="bigger: no such job file; named jobs: big"):
        load_job("bigger", shelf=shelf)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such job file"):
        load_job(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml: not UTF-8 text: byte 9 is 0xe9"):
        load_job(tmp_path / "latin.yaml")


def test_later_problems_find_their_line_too(tmp_path: Path) -> None:
    read = read_job(written(tmp_path, a="name: a\nlayout:\n  ep: 3\n"), ["layout.tp=2"])
    assert str(read.problem("layout.ep", "no")).endswith("a.yaml:3: layout.ep: no")
    assert str(read.problem("layout.tp", "no")) == "--set: layout.tp: no"
    assert str(read.problem("training.steps", "no")).endswith("a.yaml:1: training.steps: no")


@pytest.mark.parametrize(
    ("written", "kinds"),
    [
        ("none", set()),
        ("selective", {"norm", "activation", "permute"}),
        ("full", {"layer"}),
        ("[moe, norm]", {"moe", "norm"}),
        ("[]", set()),
    ],
)
def test_what_is_computed_again(tmp_path: Path, written: str, kinds: set[str]) -> None:
    (tmp_path / "x.yaml").write_text(f"name: x\ntraining: {{activation_checkpointing: {written}}}\n")
    assert load_job(tmp_path / "x.yaml").training.recomputed == kinds
