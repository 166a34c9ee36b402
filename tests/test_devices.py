"""The same on every device: integers in eval, ranges, one file. The rows of a GPU skip themselves where there is none.

A GPU may add gradients in another order, so that nets are compared after ranges have moved and before parameters have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from attention_nets import ATTENTION_NETS
from nets import NETS
from ranks import RANKS, group
from test_distributed import data, fixed, half, sgd, step
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import linger

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPUS = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} GPUs")
DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
BACKEND = pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=GPUS)])


class Recurrent(nn.Module):
    """(N, 9, 6) -> (N, 3)"""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.fc = kind(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.rnn(x)[0]).mean(1))


MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "KeywordNet": NETS["KeywordNet"], "UNet": NETS["UNet"], "SpeechNet": ATTENTION_NETS["SpeechNet"],
    "LSTM": (lambda: Recurrent(nn.LSTM), (9, 6)), "GRU": (lambda: Recurrent(nn.GRU), (9, 6)),
}  # fmt: skip


def followed(name: str, device: str, steps: int = 3) -> tuple[nn.Module, Tensor]:
    """A net whose ranges have seen batches on this device, and another batch."""
    torch.manual_seed(0)
    make, shape = MAKERS[name]
    net, batches = make(), torch.randn(steps + 1, 4, *shape)
    linger.trace_layers(net, net, batches[0])
    net = linger.init(net).to(device)
    for x in batches[:steps]:
        net(x.to(device))
    return net, batches[-1]


@DEVICE
@pytest.mark.parametrize("name", MAKERS)
def test_integers_and_files(name: str, device: str, tmp_path: Path) -> None:
    """Ranges of random reals may differ in a last bit, the grids that they name and the integers do not."""
    net, x = followed(name, device)
    expected, _ = followed(name, "cpu")
    with torch.no_grad():
        found = net.eval()(x.to(device)).cpu()
        assert torch.equal(found, expected.eval()(x))
        assert torch.equal(found, copy.deepcopy(net).cpu()(x))
    linger.onnx.export(net, (x.to(device),), tmp_path / "net.onnx")
    model = linger.runtime.load(tmp_path / "net.onnx")
    assert torch.equal(torch.from_numpy(model(x.numpy())), found)


@DEVICE
@pytest.mark.parametrize("name", MAKERS)
def test_a_training_step(name: str, device: str) -> None:
    net, x = followed(name, device)
    net.train()(x.to(device)).square().mean().backward()
    expected, _ = followed(name, "cpu")
    expected.train()(x).square().mean().backward()
    for (key, p), q in zip(net.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad.cpu(), q[1].grad, rtol=1e-3, atol=1e-5, msg=key)  # type: ignore[union-attr]


def rank(number: int, folder: str, backend: str, device: str) -> None:
    with group(number, folder, backend=backend):
        place = torch.device(device, number) if device == "cuda" else torch.device(device)
        net = fixed().to(place)
        parallel = DistributedDataParallel(net, device_ids=[number] if device == "cuda" else None)
        net(half(data(1)[0], number).to(place))
        torch.save({k: v.cpu() for k, v in net.state_dict().items()}, Path(folder) / f"first{number}.pt")
        optimizer = sgd(parallel)
        for x in data(2):
            step(parallel, optimizer, half(x, number).to(place))
        linger.onnx.export(net.eval(), (data(1)[0].to(place),), Path(folder) / f"{number}.onnx")


@BACKEND
def test_ranks(backend: str, device: str, tmp_path: Path) -> None:
    """The ranges of one process with the whole batch, and one file."""
    mp.spawn(rank, (str(tmp_path), backend, device), nprocs=RANKS)
    whole = fixed()
    whole(data(1)[0])
    for number in range(RANKS):
        found = torch.load(tmp_path / f"first{number}.pt", weights_only=True)
        ranges = {k: v for k, v in whole.state_dict().items() if "running_" in k}
        assert {k: found[k] for k in ranges} == ranges
    first, second = (tmp_path / f"{number}.onnx" for number in range(RANKS))
    assert first.read_bytes() == second.read_bytes()
