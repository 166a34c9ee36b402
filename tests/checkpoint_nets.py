"""What the tests of checkpoints share: nets written plainly, the stages they go through, and what a load must give."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger

State = dict[str, Tensor]

STAGES = ("raw", "traced", "normalized", "fixed")
LATER = STAGES[1:]
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
WEIGHTED = ("running_x", "running_w", "running_o", "scale_x", "scale_w", "scale_o")
ADD = "_linger_round_tensor_iqadd__default_index_0"
BOUND = 32.0
SHAPE = (2, 3, 6, 6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.bn = nn.BatchNorm2d(4, eps=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + x)


class Net(nn.Module):
    """conv + bn at the top and in a block, a functional sum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.block = Block()
        self.fc = nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.relu(self.bn(self.conv(x))))
        return self.fc(torch.flatten(x, 1))


PAIRS = {"conv": ("bn", 1e-5), "block.conv": ("block.bn", 1e-2)}


class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Mixed(nn.Module):
    """Every layer and call of upstream 1.1.1 that has state: fused conv, lone bn, pool, relu6, linear, + * / cat sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.pool = nn.AvgPool2d(2)
        self.norm = nn.BatchNorm2d(4)
        self.relu6 = nn.ReLU6()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.pool(F.relu(self.bn(self.conv(x)))))
        z = self.relu6(y)
        a = y + z
        c = torch.cat([a, a * z], 1) / 2.0
        return self.fc(c.sum((2, 3)))


MIXED_BUFFERS: dict[str, tuple[str, ...]] = {
    "conv": WEIGHTED,
    "norm": WEIGHTED,
    "fc": WEIGHTED,
    "pool": ("running_x", "running_o", "scale_x", "scale_o"),
    "relu6": ("running_x", "scale_x"),
    ADD: ("running_o", "scale_o"),
    "_linger_round_tensor_iqmul__default_index_1": ("running_o", "scale_o", "y"),
    "_linger_round_tensor_iqcat_2": ("running_o", "scale_o"),
    "_linger_round_tensor_iqdiv__default_index_3": ("running_o", "scale_o"),
    "_linger_round_tensor_iqsum__default_index_4": ("running_o", "scale_o"),
}


class Routed(nn.Module):
    """Sites at the top, in a block used twice in one container, from quant_tensor, and with an operand that has no grid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(linger.quant_tensor(self, x, "entry"))
        y = self.blocks(y)
        return torch.cat([y, y * torch.sin(x[:, :1])], 1).sum(1)


class ConvNorm(nn.Module):
    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def randomized(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net with weights and statistics that are not those of a new one."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=made) + 0.5)
            elif name.endswith("num_batches_tracked"):
                value.fill_(seed + 7)
            else:
                value.copy_(torch.randn(value.shape, generator=made) * 0.4)
    return net


def batch(seed: int = 1, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convert(net: nn.Module, stage: str, start: str = "raw", sample: Tensor | None = None) -> nn.Module:
    """``net`` taken from stage ``start`` to ``stage`` through every stage between."""
    for step in STAGES[STAGES.index(start) + 1 : STAGES.index(stage) + 1]:
        if step == "traced":
            linger.trace_layers(net, net, batch() if sample is None else sample)
        elif step == "normalized":
            net = linger.normalize_layers(
                net, normalize_weight_value=BOUND, normalize_bias_value=BOUND, normalize_output_value=BOUND
            )
        else:
            net = linger.init(net)
    return net


def see(net: nn.Module, x: Tensor) -> None:
    """One batch in train mode, for the grids."""
    with torch.no_grad():
        net.train()(x)


def output(net: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return net.eval()(batch(2) if x is None else x)


def source(stage: str, seed: int = 0) -> nn.Module:
    """A net to save: known values, taken to ``stage``; in fixed point with grids."""
    net = convert(randomized(Net(), seed), stage)
    if stage == "fixed":
        see(net, batch(seed + 10))
    return net.eval()


def clones(state: Mapping[str, Tensor]) -> State:
    return {key: value.clone() for key, value in state.items()}


def saved_of(net: nn.Module) -> State:
    return clones(net.state_dict())


def saved(stage: str, seed: int = 0) -> State:
    return saved_of(source(stage, seed))


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    different = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not different


def expected(values: State, stage: str) -> State:
    """The parameters and statistics of ``values``, a raw state dict of Net, under the keys of ``stage``."""
    out = dict(values)
    if stage == "raw":
        return out
    for conv, (bn, eps) in PAIRS.items():
        weight, bias = out.pop(f"{conv}.weight"), out.pop(f"{conv}.bias", None)
        norm = {key: out.pop(f"{bn}.{key}") for key in NORM}
        if stage == "fixed":
            alpha = norm["weight"] * torch.rsqrt(norm["running_var"] + eps)
            out[f"{conv}.weight"] = weight * alpha[:, None, None, None]
            out[f"{conv}.bias"] = ((0 if bias is None else bias) - norm["running_mean"]) * alpha + norm["bias"]
        else:
            out |= {f"{conv}.bn.{key}": value for key, value in norm.items()} | {f"{conv}.conv.weight": weight}
            out |= {} if bias is None else {f"{conv}.conv.bias": bias}
    return out


def not_grids(state: Mapping[str, Tensor]) -> State:
    grid = re.compile(r"\.(scale_\w+|running_(?!mean$|var$)\w+)$")
    return {key: value for key, value in state.items() if not grid.search(key)}


def named(error: BaseException) -> set[str]:
    """Every key that the message of a failed load names."""
    text = str(error)
    return set(re.findall(r'"([^"]+)"', text)) | set(re.findall(r"size mismatch for ([\w.]+):", text))


def untraced(make: Callable[[], nn.Module] = Routed, **options: int) -> nn.Module:
    return linger.init(randomized(make()), **options)
