"""Is an imported checkpoint the model it was made of, for transformers and under any layout, whole or absent?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from concertina.config import ModelConfig
from concertina.errors import CheckpointError, ConfigError, NotFoundError, UserError
from concertina.hf.folder import HuggingFaceFolder
from concertina.hf.importing import MODEL_FILE, from_folder, import_folder
from concertina.hf.oracle import compare
from concertina.hf.passage import pass_through
from concertina.hf.weights import key_of, shapes_of
from concertina.layout import Box, Layout
from concertina.model import Decoder
from concertina.model.families import model_config, pieces
from concertina.parallel.groups import Groups
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import load_boxes
from concertina.state.manifest import read_manifest, verify
from tests.allocations import recorded
from tests.hf.folders import FAMILIES, recut, source, tensors_in
from tests.model.errors import error
from tests.model.hf_models import reference

pytestmark = pytest.mark.unit


def decoder_of(checkpoint: Path, model: ModelConfig) -> Decoder:
    decoder = Decoder(model, torch.float32, torch.device("cpu"), Groups.alone(), 0, initial=False)
    live = {**dict(decoder.named_tensors()), **decoder.router_biases()}
    shapes = shapes_of(model)
    assert {name: tuple(tensor.shape) for name, tensor in live.items()} == shapes
    boxes = {key_of(name): BoxedTensor(t.detach(), Box.whole(shapes[name]), shapes[name]) for name, t in live.items()}
    load_boxes(checkpoint, boxes)
    return decoder


@pytest.mark.parametrize("case", FAMILIES)
def test_a_decoder_that_loads_it_says_what_transformers_says(case: str, tmp_path: Path) -> None:
    done = import_folder(source(case), tmp_path / "imported")
    assert done.family == FAMILIES[case]
    assert done.compared == "transformers 5.23.0"
    assert done.left_out == ()
    manifest = verify(tmp_path / "imported")
    assert manifest.step == 0
    assert manifest.facts["imported_from"] == FAMILIES[case]
    tokens = torch.randint(0, 96, (3, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = decoder_of(tmp_path / "imported", done.model).logits(tokens)
        assert error(ours, reference(case)(input_ids=tokens).logits) <= 1e-5


def test_the_file_beside_it_says_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("deepseek"), folder)
    (folder / "tokenizer.json").write_text("{}")
    done = import_folder(folder, tmp_path / "imported")
    document = yaml.safe_load((tmp_path / "imported" / MODEL_FILE).read_text())
    assert ModelConfig.model_validate(document["model"]) == done.model
    assert document["training"] == {"precision": "float32"}
    assert document["data"]["tokenizer"]["path"] == str(tmp_path / "imported" / "tokenizer.json")
    assert (tmp_path / "imported" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("case", ["mixtral", "deepseek"])
def test_fused_experts_are_read_too(case: str, tmp_path: Path) -> None:
    folder = source(case, fused=True)
    assert any(name.endswith("experts.gate_up_proj") for name in tensors_in(folder))
    import_folder(folder, tmp_path / "fused")
    import_folder(source(case), tmp_path / "single")
    fused, single = (tensors_in(tmp_path / name) for name in ("fused", "single"))
    assert fused.keys() == single.keys()
    assert all(torch.equal(fused[key], single[key]) for key in single)


@pytest.mark.parametrize(
    ("case", "layout"),
    [("deepseek", Layout(4, tp=2, ep=4)), ("qwen2", Layout(8, tp=4, ep=2, etp=2)), ("mixtral", Layout(3, ep=3))],
    ids=str,
)
def test_any_layout_loads_it(case: str, layout: Layout, tmp_path: Path) -> None:
    done = import_folder(source(case), tmp_path / "imported")
    again = recut(tmp_path / "imported", done.model, layout, tmp_path / "run")
    whole, cut = (decoder_of(folder, done.model) for folder in (tmp_path / "imported", again))
    for (name, one), (_, other) in zip(whole.named_tensors(), cut.named_tensors(), strict=True):
        assert torch.equal(one, other), name
    assert whole.router_biases().keys() == cut.router_biases().keys()
    assert all(torch.equal(bias, cut.router_biases()[name]) for name, bias in whole.router_biases().items())


def test_layers_that_predict_a_token_more_are_left_out_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("deepseek"), folder)
    tensors = tensors_in(folder)
    extra = {f"model.layers.2.{name}": torch.ones(3) for name in ("eh_proj.weight", "enorm.weight")}
    save_file({**tensors, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    done = import_folder(folder, tmp_path / "imported")
    assert done.left_out == tuple(extra)
    assert done.compared, "transformers leaves them out as well"
    save_file({**tensors, "model.layers.3.x": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 tensors are none of the model's"):
        import_folder(folder, tmp_path / "other")


def test_what_is_missing_or_misshapen_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("mixtral"), folder)
    tensors = tensors_in(folder)
    first = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    without = {name: tensor for name, tensor in tensors.items() if name != first}
    save_file(without, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"1 of {len(tensors)} tensors are missing, the first is {first}"):
        import_folder(folder, tmp_path / "imported")
    save_file({**tensors, first: tensors[first].t().contiguous()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"w2\.weight has shape \(24, 32\), config\.json says \(32, 24\)"):
        import_folder(folder, tmp_path / "imported")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def corrupt(folder: Path) -> None:
    """One bit of the last weight."""
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_what_is_read_back_is_compared_and_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"imported: 1 of \d+ tensors read back differ.*the first is"):
        import_folder(source("olmoe"), tmp_path / "imported", corrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_puts_tensors_in_the_wrong_place_is_seen_by_transformers(tmp_path: Path) -> None:
    """Whoever reads and writes with the same wrong table would agree with himself."""
    folder = tmp_path / "source"
    shutil.copytree(source("mixtral"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10.0  # as if we had missed it
    (folder / "config.json").write_text(json.dumps(config))
    found = HuggingFaceFolder(folder)
    model = model_config(config).model_copy(update={"rope_theta": 1e6})
    logits = pass_through(model, torch.float32, from_folder(found, pieces("mixtral", model, False))).logits
    with pytest.raises(CheckpointError, match="logits of 4 sequences are off by"):
        compare(folder, model, logits)


def test_places_that_are_taken_and_folders_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="is there already and not empty"):
        import_folder(source("mixtral"), tmp_path / "taken")
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        import_folder(tmp_path / "nowhere", tmp_path / "imported")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "gpt_oss"}')
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(ConfigError, match="model_type=gpt_oss is not supported"):
        import_folder(tmp_path / "empty", tmp_path / "imported")


def test_weights_of_bfloat16_become_fp32_masters(tmp_path: Path) -> None:
    import_folder(source("qwen2", torch.bfloat16), tmp_path / "imported")
    assert read_manifest(tmp_path / "imported").facts["precision"] == "bfloat16"
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "imported").values()} == {torch.float32}


def test_weights_of_float64_stay(tmp_path: Path) -> None:
    done = import_folder(source("deepseek", torch.float64), tmp_path / "imported")
    assert done.compared
    assert read_manifest(tmp_path / "imported").facts["precision"] == "float64"
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "imported").values()} == {torch.float64}


def layered(tmp_path: Path, layers: int) -> Path:
    """A mixtral of that many layers, `layer_bytes` each in fp32, with a small vocabulary."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / f"of{layers}")
    return tmp_path / f"of{layers}"


def layer_bytes() -> int:
    return (8 * 3 * 128 * 256 + 4 * 256 * 256 + 8 * 256) * 4


def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """However many there are: files are mapped, layers let go."""
    import_folder(layered(tmp_path, 1), tmp_path / "first", most_compared=0)  # what is imported is nobody's tensor
    layer = layer_bytes()
    for layers in (2, 6):
        folder = layered(tmp_path, layers)
        with recorded(python=True) as found:
            import_folder(folder, tmp_path / f"imported{layers}", most_compared=0)
        assert layer < found.peak_bytes < 1.2 * layer, found.peak_bytes / layer
        assert found.python_peak_bytes < layer
