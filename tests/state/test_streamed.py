"""Do others read what was written tensor by tensor: safetensors the file, any layout the checkpoint?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from concertina.layout import Box
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import load_boxes
from concertina.state.manifest import checkpoint_folder, commit, partial_folder, verify
from concertina.state.streamed import StreamedPart, TensorFile
from tests.allocations import recorded

pytestmark = pytest.mark.unit

MiB = 1 << 20


def test_safetensors_reads_it(tmp_path: Path) -> None:
    """Odd numbers of narrow elements before wide ones: each is aligned all the same. Written in any order, rounded."""
    given = {
        "narrow": torch.randn(3, 5),
        "wide": torch.randn(7, dtype=torch.float64),
        "turned": torch.randn(4, 3).t(),
        "nothing": torch.empty(0, 2),
        "one": torch.tensor(2.5),
    }
    dtypes = {"narrow": torch.bfloat16, "wide": torch.float64, "turned": torch.float32}
    entries = {
        name: (dtypes.get(name, torch.float32), tuple(int(n) for n in tensor.shape)) for name, tensor in given.items()
    }
    file = TensorFile(tmp_path / "a.safetensors", entries, {"format": "pt"})
    for name in reversed(given):
        file.write(name, given[name])
    file.close()
    with safe_open(tmp_path / "a.safetensors", framework="pt") as read:
        assert read.metadata() == {"format": "pt"}
        assert set(read.keys()) == set(given)
        for name, tensor in given.items():
            found = read.get_tensor(name)
            assert found.dtype == entries[name][0]
            assert torch.equal(found, tensor.to(found.dtype))


def test_a_tensor_that_is_left_out_or_written_twice_is_seen(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "a.safetensors", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}, {})
    file.write("a", torch.zeros(2))
    with pytest.raises(KeyError):
        file.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="1 tensors were not written"):
        file.close()


def test_it_holds_nothing(tmp_path: Path) -> None:
    tensor = torch.randn(MiB)
    entries = {str(number): (torch.float32, (MiB,)) for number in range(4)}
    with recorded(python=True) as found:
        file = TensorFile(tmp_path / "a.safetensors", entries, {})
        for name in entries:
            file.write(name, tensor)
        file.close()
    assert found.peak_bytes == 0
    assert found.python_peak_bytes < MiB


def test_any_cut_loads_a_streamed_part(tmp_path: Path) -> None:
    whole = {"master/a": torch.randn(7, 3), "buffer/b": torch.randn(5)}
    part = StreamedPart(
        partial_folder(tmp_path, 0, 0), {"master/a": (torch.float32, (7, 3)), "buffer/b": (torch.float32, (5,))}
    )
    for key, tensor in whole.items():
        part.write(key, tensor)
    part.finish()
    assert commit(tmp_path, 0, 0, {"step": 0}) is not None
    folder = checkpoint_folder(tmp_path, 0)
    assert verify(folder).shapes == {"master/a": (7, 3), "buffer/b": (5,)}
    for rank in range(3):
        box = Box.whole((7, 3)).cut(0, 3, rank)
        wanted = BoxedTensor(torch.zeros(box.shape), box, (7, 3))
        load_boxes(folder, {"master/a": wanted})
        assert torch.equal(wanted.piece, whole["master/a"][box.slices()])
