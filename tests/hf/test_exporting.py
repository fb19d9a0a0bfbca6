"""Does an export hold the weights of its checkpoint, of any layout, bit for bit, and does transformers read it?"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from tokenizers import Tokenizer

from concertina.data.tokenizer import END_OF_TEXT, train_tokenizer
from concertina.errors import CheckpointError, ConfigError, UserError
from concertina.hf.exporting import Exported, Origin, Wish, export_checkpoint, plan_files
from concertina.hf.folder import INDEX
from concertina.hf.importing import Imported, import_folder
from concertina.layout import Layout
from concertina.model.families import Piece, pieces
from tests.allocations import recorded
from tests.hf.folders import FAMILIES, recut, source, tensors_in
from tests.hf.test_importing import layer_bytes, layered
from tests.model.errors import error
from tests.model.hf_models import reference

pytestmark = pytest.mark.unit


@cache
def _made(case: str, dtype: torch.dtype) -> tuple[TemporaryDirectory[str], Imported]:
    place = TemporaryDirectory(prefix="imported-")  # gone with the process
    return place, import_folder(source(case, dtype), Path(place.name), most_compared=0)


def imported(case: str, dtype: torch.dtype = torch.float32) -> Imported:
    return _made(case, dtype)[1]


def export(case: str, out: Path, wish: Wish | None = None, dtype: torch.dtype = torch.float32) -> Exported:
    done = imported(case, dtype)
    return export_checkpoint(Origin(done.folder, done.model, case, done.folder), out, wish)


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = tensors_in(found), tensors_in(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FAMILIES)
def test_there_and_back_changes_no_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Names, shapes, dtypes, contents; biases of routers stay in fp32."""
    done = export(case, tmp_path / "out", dtype=dtype)
    assert done.family == FAMILIES[case]
    assert done.compared == "transformers 5.23.0"
    assert_same(tmp_path / "out", source(case, dtype))


@pytest.mark.parametrize("case", FAMILIES)
def test_transformers_reloads_it_and_says_the_same(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(case, tmp_path / "out", Wish(shard_bytes=20_000, most_compared=0))
    assert len(list(tmp_path.glob("out/model-0*.safetensors"))) > 3
    tokens = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(3))
    again, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, reference(case)(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("deepseek", Layout(4, tp=4, ep=2, etp=2)),
        ("deepseek", Layout(5)),
        ("qwen3-dense-first-unnormalized", Layout(3, ep=3)),
        ("olmoe", Layout(4, tp=2, ep=2)),
        ("qwen2", Layout(8, tp=4, ep=2, etp=2)),  # fewer key-value heads than lanes
        ("mixtral", Layout(6, tp=2, ep=3, etp=2)),
    ],
    ids=str,
)
def test_from_any_layout(case: str, layout: Layout, tmp_path: Path) -> None:
    done = imported(case)
    checkpoint = recut(done.folder, done.model, layout, tmp_path / "run")
    export_checkpoint(Origin(checkpoint, done.model, case), tmp_path / "out", Wish(most_compared=0))
    assert_same(tmp_path / "out", source(case))


def test_another_dtype_rounds_weights_and_no_bias(tmp_path: Path) -> None:
    export("deepseek", tmp_path / "out", Wish(dtype="bfloat16"))
    ours, theirs = tensors_in(tmp_path / "out"), tensors_in(source("deepseek"))
    for name, tensor in theirs.items():
        wide = name.endswith("e_score_correction_bias")
        assert torch.equal(ours[name], tensor if wide else tensor.to(torch.bfloat16)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_float64_holds_the_same_numbers(tmp_path: Path) -> None:
    export("olmoe", tmp_path / "out", Wish(dtype="float64"))
    ours, theirs = tensors_in(tmp_path / "out"), tensors_in(source("olmoe"))
    assert all(torch.equal(ours[name], tensor.to(torch.float64)) for name, tensor in theirs.items())


def test_files_are_as_large_as_asked_and_the_index_knows_them(tmp_path: Path) -> None:
    done = export("mixtral", tmp_path / "out", Wish(shard_bytes=20_000, most_compared=0))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(done.files)
    assert index["metadata"]["total_size"] == done.bytes
    assert index["weight_map"].keys() == tensors_in(source("mixtral")).keys()
    tensors = tensors_in(tmp_path / "out")
    for file in done.files:
        assert sum(tensors[name].nbytes for name, where in index["weight_map"].items() if where == file) <= 20_000


def test_a_tensor_that_is_larger_has_a_file_of_its_own() -> None:
    table = [Piece(name, name, (), (size,)) for name, size in (("a", 4), ("b", 100), ("c", 4), ("d", 4))]
    planned = plan_files(table, torch.float32, 64)
    assert [list(entries) for entries in planned.values()] == [["a"], ["b"], ["c", "d"]]
    assert next(iter(planned)) == "model-00001-of-00003.safetensors"
    assert list(plan_files(table, torch.float32, 10_000)) == ["model.safetensors"]


def flip(pattern: str, position: int) -> object:
    def damage(folder: Path) -> None:
        file = sorted(folder.glob(pattern))[0]
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        file.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip("model.safetensors", -3), r"1 of \d+ tensors read back differ from what was written, the first is"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 8), r"not a safetensors file"),
        (
            lambda folder: (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace('"num_local_experts": 4', '"num_local_experts": 3')
            ),
            r"tensors are none of the model's",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1')
            ),
            r"logits read back differ by \S+, weights do not",
        ),
    ],
    ids=["a bit", "a file", "an expert less", "a choice less"],
)
def test_what_is_read_back_is_compared_and_nothing_is_left_of_a_failure(
    damage: object, said: str, tmp_path: Path
) -> None:
    done = imported("mixtral")
    with pytest.raises(CheckpointError, match=said) as failed:
        export_checkpoint(Origin(done.folder, done.model, "x"), tmp_path / "out", None, damage)  # type: ignore[arg-type]
    assert failed.value.exit_code == 105
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    done = imported("mixtral")
    shutil.copytree(done.folder, tmp_path / "copy")
    flip("*.safetensors", -3)(tmp_path / "copy")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="sha256 differs"):
        export_checkpoint(Origin(tmp_path / "copy", done.model, "x"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals_come_before_anything_is_written(tmp_path: Path) -> None:
    done = imported("qwen2")
    with pytest.raises(ConfigError, match="no family of Hugging Face's says this model: mixtral: "):
        export_checkpoint(Origin(done.folder, done.model, "x"), tmp_path / "out", Wish(family="mixtral"))
    other = done.model.model_copy(update={"vocab_size": 97})
    with pytest.raises(ConfigError, match=r"shape \(96, 32\) in the checkpoint, and has shape \(97, 32\) in"):
        export_checkpoint(Origin(done.folder, other, "x"), tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="is there already"):
        export_checkpoint(Origin(done.folder, done.model, "x"), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer: Tokenizer = train_tokenizer(["a few words, a few words more"], 300)
    (tmp_path / "corpus").mkdir()
    tokenizer.save(str(tmp_path / "corpus" / "tokenizer.json"))
    done = imported("mixtral")
    origin = Origin(done.folder, done.model, "a-run", tmp_path / "corpus", {"run": "a-run", "validation loss": 1.25})
    assert export_checkpoint(origin, tmp_path / "out", Wish(most_compared=0)).tokenizer
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read.encode("a few words") == tokenizer.encode("a few words").ids
    assert read.eos_token == END_OF_TEXT
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == end
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == end
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# a-run" in card
    assert "| validation loss | 1.25 |" in card


def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """However many there are; with rounding, and many files."""
    layer = layer_bytes()
    for number, layers in enumerate((1, 2, 6)):
        done = import_folder(layered(tmp_path, layers), tmp_path / f"imported{layers}", most_compared=0)
        wish = Wish(dtype="bfloat16", shard_bytes=1 << 20, most_compared=0)
        with recorded(python=True) as found:
            export_checkpoint(Origin(done.folder, done.model, "x"), tmp_path / f"out{layers}", wish)
        if number:  # what the first one imports is nobody's tensor
            assert layer < found.peak_bytes < 1.2 * layer, found.peak_bytes / layer
            assert found.python_peak_bytes < layer


def test_the_table_is_in_the_order_of_the_pass() -> None:
    """Or a second file would be open while the first is not whole."""
    for case in FAMILIES:
        done = imported(case)
        ours = [piece.ours.split(".moe")[0].split(".attention")[0] for piece in pieces(done.family, done.model, False)]
        units = [name for name, before in zip(ours, ["", *ours[:-1]], strict=True) if name != before]
        assert units[0] == "embedding.weight"
        layers = [name for name in units if name.startswith("layers")]
        assert layers == sorted(layers, key=lambda name: int(name.split(".")[1]))


def test_logits_of_an_export_are_those_of_the_masters_rounded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export("qwen3-dense-first-unnormalized", tmp_path / "out", Wish(dtype="bfloat16"))
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=tokens).logits
        full = reference("qwen3-dense-first-unnormalized")(input_ids=tokens).logits
    assert 0 < error(read, full) < 0.2
