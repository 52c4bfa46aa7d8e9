"""Weights travel to PyTorch and back, and give the same outputs there."""

import json
from pathlib import Path

import numpy as np
import pytest

import distprop as dp
import networks
from distprop import nn
from distprop.weights import WeightsError


class Block(nn.Module):
    """The residual block of a small ResNet."""

    def __init__(self, channels: int) -> None:
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = dp.functional.relu(self.bn1(self.conv1(x)))
        return dp.functional.relu(x + self.bn2(self.conv2(y)))


def mlp(kit):
    return kit.Sequential(kit.Linear(6, 8), kit.ReLU(), kit.Linear(8, 3))


def encoder(kit):
    layers = [kit.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)]
    return kit.Sequential(kit.Embedding(11, 16), *layers, kit.LayerNorm(16), kit.Linear(16, 11))


def gpt(kit):
    """nanoGPT's: causal, and the embedding of the characters is the last layer's weight too."""
    if kit is nn:
        return Scores(networks.distprop_model("gpt"))
    import torch

    model = networks.torch_model("gpt")  # whose embeddings PyTorch begins fifty times as large as nanoGPT
    start = networks.initial_state("gpt", {name: tuple(p.shape) for name, p in model.named_parameters()})
    model.load_state_dict({name: torch.from_numpy(array) for name, array in start.items()})
    return model


class Scores(nn.Module):
    """(batch, characters, T), as losses want it, with the axes of PyTorch's model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def forward(self, ids):
        return self.model(ids).transpose(1, 2)

    def state_dict(self):
        return self.model.state_dict()

    def load_state_dict(self, state, strict=True):
        self.model.load_state_dict(state, strict)


def lstm(kit):
    return kit.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True)


def resnet(kit):
    if kit is nn:
        block = Block(8)
    else:
        import torch

        class TorchBlock(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv1, self.bn1 = kit.Conv2d(8, 8, 3, padding=1, bias=False), kit.BatchNorm2d(8)
                self.conv2, self.bn2 = kit.Conv2d(8, 8, 3, padding=1, bias=False), kit.BatchNorm2d(8)

            def forward(self, x):
                return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

        block = TorchBlock()
    first = kit.Conv2d(3, 8, 3, stride=2, padding=1)
    return kit.Sequential(first, kit.BatchNorm2d(8), kit.ReLU(), block, kit.AdaptiveAvgPool2d(1), kit.Flatten())


RNG = np.random.default_rng(0)
MODELS = {
    "mlp": (mlp, RNG.normal(size=(4, 6)).astype(np.float32)),
    "resnet": (resnet, RNG.normal(size=(4, 3, 12, 12)).astype(np.float32)),
    "lstm": (lstm, RNG.normal(size=(4, 9, 5)).astype(np.float32)),
    "encoder": (encoder, RNG.integers(0, 11, (4, 7))),
    "gpt": (gpt, RNG.integers(0, networks.CHARACTERS, (4, 7))),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("direction", ["to PyTorch", "from PyTorch"])
def test_the_same_weights_give_the_same_outputs(name: str, direction: str, tmp_path: Path, torch) -> None:
    from safetensors.torch import load_file, save_file

    make, x = MODELS[name]
    ours, theirs = make(nn), make(torch.nn)
    for _ in range(2):  # running statistics that are worth sending
        ours(x)
        theirs(torch.from_numpy(x))
    ours.eval()
    theirs.eval()
    path = tmp_path / "model.safetensors"
    if direction == "to PyTorch":
        dp.save_state(ours.state_dict(), path)
        theirs.load_state_dict(load_file(path))
    else:
        save_file(theirs.state_dict(), path)
        ours.load_state_dict(dp.load_state(path))
    with torch.no_grad():
        expected = first(theirs(torch.from_numpy(x))).numpy()
    np.testing.assert_allclose(first(ours(x)).data, expected, rtol=2e-5, atol=2e-6)


def test_a_saved_state_is_read_back(tmp_path: Path) -> None:
    state = {"w": np.arange(6.0).reshape(2, 3).T, "n": np.array(3)}
    dp.save_state(state, tmp_path / "a.safetensors")
    found = dp.load_state(tmp_path / "a.safetensors")
    assert {name: (a.dtype, a.shape) for name, a in found.items()} == {n: (a.dtype, a.shape) for n, a in state.items()}
    assert all(np.array_equal(found[name], state[name]) for name in state)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    dp.save_state({"w": np.arange(6.0)}, path)
    content = path.read_bytes()
    for length in (0, 4, 20, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=r"a\.safetensors is not a whole safetensors file"):
            dp.load_state(path)


@pytest.mark.parametrize("shape", [[0, 2**62], [1] * 70])
def test_a_shape_that_no_array_has_is_refused(shape: list[int], tmp_path: Path) -> None:
    size = 0 if 0 in shape else 4
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        dp.load_state(path)


@pytest.mark.parametrize("offsets", [[0, 4096], [8, 0], [4, 12], [0, 4]])
def test_a_file_that_lies_about_its_offsets_is_refused(offsets: list[int], tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        dp.load_state(path)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_numbers_that_numpy_lacks_are_named(dtype: str, tmp_path: Path) -> None:
    size = 4 if dtype == "BF16" else 2
    header = json.dumps({"w": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(WeightsError, match=rf"a\.safetensors has numbers of type {dtype}, which NumPy does not have"):
        dp.load_state(path)


@pytest.mark.parametrize(
    "header",
    [
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        },
    ],
    ids=["overlap", "hole"],
)
def test_tensors_that_overlap_or_leave_a_hole_are_refused(header: dict[str, object], tmp_path: Path) -> None:
    content = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(12))
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        dp.load_state(path)
