"""Is a folder that is not whole, or not what it says, refused in one line that names the place?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from concertina.errors import CheckpointError, ConcertinaError, ConfigError, NotFoundError
from concertina.hf.folder import INDEX, HuggingFaceFolder
from concertina.model.families import Piece

pytestmark = pytest.mark.unit

A, B = torch.arange(6.0).view(2, 3), torch.arange(4.0)
TABLE = [Piece("a", "x", (), (2, 3)), Piece("b", "y", (), (4,))]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(single: Path) -> Path:
    (single / "model.safetensors").unlink()
    save_file({"a": A}, single / "one.safetensors")
    save_file({"b": B}, single / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (single / INDEX).write_text(json.dumps(index))
    return single


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_are_found_and_filled_in(kind: str, request: pytest.FixtureRequest) -> None:
    folder = HuggingFaceFolder(request.getfixturevalue(kind))
    folder.check(TABLE)
    into = {"x": torch.zeros(2, 3), "y": torch.zeros(4)}
    folder.fill(TABLE, into)
    assert torch.equal(into["x"], A)
    assert torch.equal(into["y"], B)
    assert folder.dtype(TABLE) == torch.float32
    assert not folder.fused


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


DAMAGE: dict[str, tuple[Callable[[Path], object], type[ConcertinaError], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), NotFoundError, r"no config\.json"),
    "no JSON": (rewrite("config.json", lambda text: text[:-1]), ConfigError, r"config\.json: not JSON"),
    "a list": (rewrite("config.json", lambda _: b"[]"), ConfigError, "expected a JSON object"),
    "truncated": (rewrite("one.safetensors", lambda text: text[:-4]), CheckpointError, r"one\.safetensors.* bytes"),
    "longer": (rewrite("two.safetensors", lambda text: text + b"\0"), CheckpointError, r"two\.safetensors.* bytes"),
    "header of nonsense": (
        rewrite("two.safetensors", lambda text: b"\xff" * 8 + text[8:]),
        CheckpointError,
        r"two\.safetensors: not a safetensors file",
    ),
    "a file is gone": (lambda folder: (folder / "two.safetensors").unlink(), CheckpointError, r"two\.safetensors: mi"),
    "index elsewhere": (
        rewrite(INDEX, lambda text: text.replace(b"two", b"one")),
        CheckpointError,
        "1 tensors are not where it says, the first is b",
    ),
    "index too short": (
        rewrite(INDEX, lambda _: b'{"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}'),
        CheckpointError,
        "2 tensors are not where it says",
    ),
    "index outside": (
        rewrite(INDEX, lambda text: text.replace(b"two", b"../two")),
        CheckpointError,
        "'../two.safetensors' is not a file of this folder",
    ),
    "no index": (lambda folder: (folder / INDEX).unlink(), NotFoundError, "neither model.safetensors nor"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(sharded: Path, kind: str) -> None:
    damage, error, said = DAMAGE[kind]
    damage(sharded)
    with pytest.raises(error, match=said):
        HuggingFaceFolder(sharded)


def test_a_pickle_is_not_read(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(NotFoundError, match=r"pytorch_model\.bin is a pickle, which is not read"):
        HuggingFaceFolder(single)


def test_quantized_tensors_are_refused_and_float16_fits_into_fp32(single: Path) -> None:
    save_file({"a": A.to(torch.float8_e4m3fn)}, single / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tensors of F8_E4M3 are not supported"):
        HuggingFaceFolder(single).dtype(TABLE[:1])
    for dtype, fits in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float64,) * 2):
        save_file({"a": A.to(dtype)}, single / "model.safetensors")
        assert HuggingFaceFolder(single).dtype(TABLE[:1]) == fits
    save_file({"a": A.to(torch.bfloat16), "b": B}, single / "model.safetensors")
    wide = Piece("b", "y", (), (4,), wide=True)
    assert HuggingFaceFolder(single).dtype([TABLE[0], wide]) == torch.bfloat16
    assert HuggingFaceFolder(single).dtype(TABLE) == torch.float32


def test_key_count_and_shapes(single: Path) -> None:
    folder = HuggingFaceFolder(single)
    with pytest.raises(CheckpointError, match=r"1 of 3 tensors are missing, the first is c"):
        folder.check([*TABLE, Piece("c", "z", (), (1,))])
    with pytest.raises(CheckpointError, match=r"1 tensors are none of the model's, the first is b"):
        folder.check(TABLE[:1])
    folder.check(TABLE[:1], ignored=["b"])
    with pytest.raises(CheckpointError, match=r"b has shape \(4,\), config\.json says \(5,\)"):
        folder.check([TABLE[0], Piece("b", "y", (), (5,))])
