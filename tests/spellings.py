"""Every way to write a call that has a fixed-point form: name -> (function of gridded tensors, shapes with the batch axis)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Spelling = tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]
ROW, SEQ, MAP = ((3, 12),), ((2, 4, 10),), ((2, 4, 6, 8),)
PAIR = ((2, 4, 6), (2, 4, 6))
ALONG = ((2, 1, 5),)  # an axis to squeeze or expand


def changed(call: Callable[..., Any]) -> Callable[..., Tensor]:
    """An in-place call on a copy of the first operand, whose result is read under the old name."""

    def function(x: Tensor, *others: Tensor) -> Tensor:
        x = x.clone()
        call(x, *others)
        return x

    return function


def plus(x: Tensor, y: Any) -> None:
    x += y


def minus(x: Tensor, y: Any) -> None:
    x -= y


def times(x: Tensor, y: Any) -> None:
    x *= y


def over(x: Tensor, y: Any) -> None:
    x /= y * y + 1


def from_shape(view: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """``n, c, h, w = x.shape`` and then a view of these numbers."""
    return lambda x: view(x, *x.shape)


# fmt: off
ARITHMETIC: dict[str, Spelling] = {
    "x + y": (lambda x, y: x + y, PAIR), "x - y": (lambda x, y: x - y, PAIR), "x * y": (lambda x, y: x * y, PAIR),
    "x / y": (lambda x, y: x / (y * y + 1), PAIR), "x + 1": (lambda x: x + 1, SEQ), "1.5 + x": (lambda x: 1.5 + x, SEQ),
    "x - 1": (lambda x: x - 1, SEQ), "1.5 - x": (lambda x: 1.5 - x, SEQ), "x * 3": (lambda x: x * 3, SEQ),
    "0.3 * x": (lambda x: 0.3 * x, SEQ), "x / 3": (lambda x: x / 3, SEQ), "2 / x": (lambda x: 2 / (x * x + 1), SEQ),
    "x += y": (changed(plus), PAIR), "x -= y": (changed(minus), PAIR), "x *= y": (changed(times), PAIR),
    "x /= y": (changed(over), PAIR), "x += 1": (changed(lambda x: plus(x, 1)), SEQ),
    "x *= 2": (changed(lambda x: times(x, 2)), SEQ),
    "add_": (changed(lambda x, y: x.add_(y)), PAIR), "sub_": (changed(lambda x, y: x.sub_(y)), PAIR),
    "mul_": (changed(lambda x, y: x.mul_(y)), PAIR), "div_": (changed(lambda x, y: x.div_(y * y + 1)), PAIR),
    "subtract_": (changed(lambda x, y: x.subtract_(y)), PAIR), "multiply_": (changed(lambda x, y: x.multiply_(y)), PAIR),
    "divide_": (changed(lambda x, y: x.divide_(y * y + 1)), PAIR),
    "true_divide_": (changed(lambda x, y: x.true_divide_(y * y + 1)), PAIR),
    "add_(alpha)": (changed(lambda x, y: x.add_(y, alpha=2)), PAIR), "mul_(2)": (changed(lambda x: x.mul_(2.0)), SEQ),
    "torch.add": (torch.add, PAIR), "torch.sub": (torch.sub, PAIR), "torch.mul": (torch.mul, PAIR),
    "torch.div": (lambda x, y: torch.div(x, y * y + 1), PAIR), "torch.subtract": (torch.subtract, PAIR),
    "torch.multiply": (torch.multiply, PAIR), "torch.divide": (lambda x, y: torch.divide(x, y * y + 1), PAIR),
    "torch.true_divide": (lambda x, y: torch.true_divide(x, y * y + 1), PAIR), "torch.rsub": (torch.rsub, PAIR),
    "torch.rsub(x, 3)": (lambda x: torch.rsub(x, 3), SEQ), "rsub(other=)": (lambda x, y: torch.rsub(x, other=y), PAIR), "rsub(alpha)": (lambda x, y: torch.rsub(x, y, alpha=2), PAIR),
    "x.add": (lambda x, y: x.add(y), PAIR), "x.sub": (lambda x, y: x.sub(y), PAIR), "x.mul": (lambda x, y: x.mul(y), PAIR),
    "x.div": (lambda x, y: x.div(y * y + 1), PAIR), "x.subtract": (lambda x, y: x.subtract(y), PAIR),
    "x.multiply": (lambda x, y: x.multiply(y), PAIR), "x.divide": (lambda x, y: x.divide(y * y + 1), PAIR),
    "x.true_divide": (lambda x, y: x.true_divide(y * y + 1), PAIR),
    "add(alpha=2)": (lambda x, y: torch.add(x, y, alpha=2), PAIR), "x.add(alpha)": (lambda x, y: x.add(y, alpha=-0.5), PAIR),
    "sub(alpha=2)": (lambda x, y: torch.sub(x, y, alpha=2), PAIR), "add(3, alpha)": (lambda x: torch.add(x, 3, alpha=2), SEQ),
    "add(input=, other=)": (lambda x, y: torch.add(input=x, other=y), PAIR),
    "add(other=, input=)": (lambda x, y: torch.add(other=y, input=x, alpha=3), PAIR),
    "mul(other=)": (lambda x, y: torch.mul(x, other=y), PAIR), "div(other=)": (lambda x: torch.div(x, other=4), SEQ),
    "div(rounding_mode=None)": (lambda x: torch.div(x, 2, rounding_mode=None), SEQ),
    "x + 0-d": (lambda x: x + torch.tensor(2.0), SEQ), "0-d - x": (lambda x: torch.tensor(2.0) - x, SEQ),
    "mul(0-d, x)": (lambda x: torch.mul(torch.tensor(2.0), x), SEQ), "x + constant": (lambda x: x + 0.75 * torch.arange(10.0), SEQ),
    "constant * x": (lambda x: torch.linspace(-1, 1, 10) * x, SEQ), "x + integers": (lambda x: x + torch.arange(-2, 8), SEQ),
    "broadcast": (lambda x, y: x + y, ((2, 4, 6), (2, 1, 6))), "broadcast rank": (lambda x: x * x.mean(1, True), SEQ),
    "x + x": (lambda x: x + x, SEQ), "x * x": (lambda x: x * x, SEQ), "x + True": (lambda x: x + True, SEQ),
    "x * np.float32": (lambda x: x * np.float32(0.5), SEQ), "np.float64 * x": (lambda x: np.float64(0.5) * x, SEQ),
    "x * 1e-3": (lambda x: x * 1e-3, SEQ), "x + 1e6": (lambda x: x + 1e6, SEQ), "x / 1e6": (lambda x: x / 1e6, SEQ),
    "sum([x, y])": (lambda x, y: sum([x, y]), PAIR), "+x": (lambda x: +x, SEQ),
}
JOINS: dict[str, Spelling] = {
    "cat": (lambda x, y: torch.cat([x, y], 1), PAIR), "cat(tuple, dim=)": (lambda x, y: torch.cat((x, y), dim=-1), PAIR),
    "cat(axis=)": (lambda x, y: torch.cat((x, y), axis=1), PAIR), "cat(tensors=)": (lambda x, y: torch.cat(tensors=[x, y], dim=1), PAIR),
    "concat": (lambda x, y: torch.concat([x, y], 1), PAIR), "concatenate": (lambda x, y: torch.concatenate([x, y], axis=1), PAIR),
    "cat of one": (lambda x: torch.cat([x], 1), MAP), "cat of five": (lambda x: torch.cat([x, x * 2, x + 1, x, x], 1), MAP),
    "cat of the batch": (lambda x, y: torch.cat([x, y]), PAIR), "cat of nothing": (lambda x: torch.cat([x[:, :0], x], 1), SEQ),
    "cat of torch.tensor([])": (lambda x: torch.cat([torch.tensor([]), x], 1), SEQ),
    "stack": (lambda x, y: torch.stack([x, y]), PAIR), "stack(dim=1)": (lambda x, y: torch.stack((x, y), dim=1), PAIR),
    "stack(-1)": (lambda x, y: torch.stack((x, y), -1), PAIR), "stack(tensors=)": (lambda x, y: torch.stack(tensors=(x, y), dim=2), PAIR),
    "hstack": (lambda x, y: torch.hstack([x, y]), PAIR), "vstack": (lambda x, y: torch.vstack([x, y]), PAIR),
    "dstack": (lambda x, y: torch.dstack([x, y]), PAIR), "column_stack": (lambda x, y: torch.column_stack([x, y]), PAIR),
}
REDUCTIONS: dict[str, Spelling] = {
    "mean(1)": (lambda x: x.mean(1), MAP), "mean((2, 3))": (lambda x: x.mean((2, 3)), MAP), "mean(-1)": (lambda x: x.mean(-1), MAP),
    "mean(dim=[2, 3], keepdim=True)": (lambda x: x.mean(dim=[2, 3], keepdim=True), MAP), "mean(1, True)": (lambda x: x.mean(1, True), MAP),
    "torch.mean": (lambda x: torch.mean(x, (-1, -2)), MAP), "mean(axis=)": (lambda x: x.mean(axis=1), MAP),
    "mean(input=)": (lambda x: torch.mean(input=x, dim=1), MAP), "mean(dtype=)": (lambda x: x.mean(1, dtype=torch.float32), MAP),
    "sum(1)": (lambda x: x.sum(1), MAP), "sum((2, 3))": (lambda x: x.sum((2, 3)), MAP), "sum(axis=-1)": (lambda x: x.sum(axis=-1), MAP),
    "torch.sum": (lambda x: torch.sum(x, dim=1, keepdim=True), MAP), "sum(input=)": (lambda x: torch.sum(input=x, dim=1), MAP),
    "sum([1])": (lambda x: x.sum([1]), MAP), "sum(1, True)": (lambda x: x.sum(1, True), MAP),
    "sum(dtype=)": (lambda x: x.sum(1, dtype=torch.float32), MAP),
}
ACTIVATIONS: dict[str, Spelling] = {
    "F.relu": (F.relu, MAP), "F.relu(inplace)": (changed(lambda x: F.relu(x, inplace=True)), MAP),
    "F.relu(input=)": (lambda x: F.relu(input=x), MAP), "torch.relu": (torch.relu, MAP), "x.relu": (lambda x: x.relu(), MAP),
    "x.relu_": (changed(lambda x: x.relu_()), MAP), "torch.relu_": (changed(torch.relu_), MAP), "F.relu_": (changed(F.relu_), MAP),
    "F.relu6": (F.relu6, MAP), "F.relu6(inplace)": (lambda x: F.relu6(x.clone(), inplace=True), MAP),
    "F.relu6(input=)": (lambda x: F.relu6(input=x), MAP), "F.dropout": (lambda x: F.dropout(x, 0.5, training=False), MAP),
}
POOLS: dict[str, Spelling] = {
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 2), MAP), "torch.max_pool2d": (lambda x: torch.max_pool2d(x, 2), MAP),
    "F.max_pool2d(kernel_size=)": (lambda x: F.max_pool2d(x, kernel_size=(2, 3), stride=1, padding=1), MAP),
    "F.max_pool2d(input=)": (lambda x: F.max_pool2d(input=x, kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=True), MAP),
    "F.max_pool1d": (lambda x: F.max_pool1d(x, 3, 2), SEQ), "torch.max_pool1d": (lambda x: torch.max_pool1d(x, 2), SEQ),
    "F.avg_pool2d": (lambda x: F.avg_pool2d(x, 2), MAP), "F.avg_pool1d": (lambda x: F.avg_pool1d(x, 3, 2, 1), SEQ),
    "F.avg_pool2d(input=)": (lambda x: F.avg_pool2d(input=x, kernel_size=3, stride=(2, 1), padding=1), MAP),
    "F.avg_pool2d(of the size)": (lambda x: F.avg_pool2d(x, x.shape[2:]), MAP),
    "F.avg_pool2d(count_include_pad)": (lambda x: F.avg_pool2d(x, 2, count_include_pad=False), MAP),
    "torch.avg_pool1d": (lambda x: torch.avg_pool1d(x, 2), SEQ), "F.avg_pool1d((2,))": (lambda x: F.avg_pool1d(x, (2,)), SEQ),
    "F.adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), MAP),
    "F.adaptive_avg_pool2d((3, 4))": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), MAP),
    "F.adaptive_avg_pool2d(output_size=)": (lambda x: F.adaptive_avg_pool2d(input=x, output_size=(None, 2)), MAP),
    "F.adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 2), SEQ),
    "torch.adaptive_avg_pool1d": (lambda x: torch.adaptive_avg_pool1d(x, (5,)), SEQ),
}
PADS: dict[str, Spelling] = {
    "F.pad": (lambda x: F.pad(x, (1, 2)), MAP), "F.pad of two axes": (lambda x: F.pad(x, (1, 2, 0, 1)), MAP),
    "F.pad(input=)": (lambda x: F.pad(input=x, pad=[1, 1], mode="constant", value=0), MAP),
    "F.pad(value=None)": (lambda x: F.pad(x, (1, 2), "constant", None), MAP), "F.pad to crop": (lambda x: F.pad(x, (-1, 2)), MAP),
    "F.pad(reflect)": (lambda x: F.pad(x, (1, 2), mode="reflect"), SEQ), "F.pad(replicate)": (lambda x: F.pad(x, (1, 2, 1, 1), "replicate"), MAP),
    "F.pad(circular)": (lambda x: F.pad(x, (1, 2, 1, 0), mode="circular"), MAP), "F.pad of channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), MAP),
    "F.pad by 0": (lambda x: F.pad(x, (0, 0)), MAP), "constant_pad_nd": (lambda x: torch.constant_pad_nd(x, (1, 1)), SEQ),
}
VIEWS: dict[str, Spelling] = {
    "view(-1, 192)": (lambda x: x.view(-1, 192), MAP), "view(size, -1)": (lambda x: x.view(x.size(0), -1), MAP),
    "view(n, c * h, w)": (from_shape(lambda x, n, c, h, w: x.view(n, c * h, w)), MAP),
    "view((n, c * h * w))": (from_shape(lambda x, n, c, h, w: x.view((n, c * h * w))), MAP),
    "view([...])": (lambda x: x.view([x.shape[0], -1]), MAP), "view(shape)": (lambda x: x.view(x.shape), MAP),
    "view(size=)": (lambda x: x.view(size=(-1, 192)), MAP), "view(-1)": (lambda x: x.view(-1), MAP),
    "view(n * c, ...)": (from_shape(lambda x, n, c, h, w: x.view(n * c, h * w)), MAP),
    "view there and back": (lambda x: x.view(x.size(0) * 4, 48).view(-1, 4, 6, 8), MAP),
    "view(dtype)": (lambda x: x.view(torch.float32) * 1.0, MAP), "view_as": (lambda x, y: x.view_as(y) + y, ((2, 6), (2, 2, 3))),
    "reshape": (lambda x: x.reshape(-1, 192), MAP), "reshape(tuple)": (lambda x: x.reshape((-1, 192)), MAP),
    "torch.reshape": (lambda x: torch.reshape(x, (x.shape[0], -1)), MAP), "reshape(shape=)": (lambda x: x.reshape(shape=(-1, 192)), MAP),
    "torch.reshape(input=)": (lambda x: torch.reshape(input=x, shape=(-1, 192)), MAP),
    "reshape(*shape[:2], -1)": (lambda x: x.reshape(*x.shape[:2], -1), MAP), "reshape_as": (lambda x, y: x.reshape_as(y) + y, ((2, 6), (2, 2, 3))),
    "flatten(1)": (lambda x: x.flatten(1), MAP), "torch.flatten": (lambda x: torch.flatten(x, 1), MAP), "flatten()": (lambda x: x.flatten(), MAP),
    "flatten(start_dim=)": (lambda x: torch.flatten(x, start_dim=1), MAP), "flatten(1, 2)": (lambda x: x.flatten(1, 2), MAP),
    "flatten(0, 1)": (lambda x: x.flatten(0, 1), MAP), "flatten(end_dim=-2)": (lambda x: x.flatten(start_dim=1, end_dim=-2), MAP),
    "unflatten": (lambda x: x.unflatten(1, (2, 2)), MAP), "torch.unflatten": (lambda x: torch.unflatten(x, 1, (2, -1)), MAP),
    "ravel": (lambda x: x.ravel(), SEQ), "torch.ravel": (torch.ravel, SEQ),
    "squeeze(1)": (lambda x: x.squeeze(1), ALONG), "squeeze(-1)": (lambda x: x.squeeze(-1), ((2, 5, 1),)), "squeeze(dim=)": (lambda x: x.squeeze(dim=1), ALONG),
    "squeeze of no axis": (lambda x: x.squeeze(1), SEQ), "squeeze((1, 3))": (lambda x: x.squeeze((1, 3)), ((2, 1, 5, 1),)),
    "torch.squeeze": (lambda x: torch.squeeze(x, 1), ALONG), "squeeze_": (lambda x: x.clone().squeeze_(1), ALONG),
    "unsqueeze(1)": (lambda x: x.unsqueeze(1), SEQ), "unsqueeze(-1)": (lambda x: x.unsqueeze(-1), SEQ), "unsqueeze(0)": (lambda x: x.unsqueeze(0), SEQ),
    "unsqueeze(dim=)": (lambda x: x.unsqueeze(dim=-2), SEQ), "torch.unsqueeze": (lambda x: torch.unsqueeze(x, dim=2), SEQ),
    "unsqueeze_": (lambda x: x.clone().unsqueeze_(1), SEQ),
    "permute": (lambda x: x.permute(0, 2, 3, 1), MAP), "permute(tuple)": (lambda x: x.permute((0, 2, 3, 1)), MAP),
    "permute(dims=)": (lambda x: x.permute(dims=(0, 2, 3, 1)), MAP), "torch.permute": (lambda x: torch.permute(x, (0, -1, 1, 2)), MAP),
    "permute of the batch": (lambda x: x.permute(1, 0, 2, 3), MAP), "transpose": (lambda x: x.transpose(1, 2), MAP),
    "transpose(dim0=)": (lambda x: x.transpose(dim0=1, dim1=-1), MAP), "torch.transpose": (lambda x: torch.transpose(x, 1, 3), MAP),
    "transpose_": (lambda x: x.clone().transpose_(1, 2), MAP), "t": (lambda x: x.t(), ROW), "torch.t": (torch.t, ROW), "t_": (lambda x: x.clone().t_(), ROW),
    "T": (lambda x: x.T, ROW), "mT": (lambda x: x.mT, SEQ), "H": (lambda x: x.H, ROW), "mH": (lambda x: x.mH, SEQ), "adjoint": (torch.adjoint, SEQ),
    "swapaxes": (lambda x: x.swapaxes(axis0=1, axis1=2), SEQ), "torch.swapaxes": (lambda x: torch.swapaxes(x, 1, 2), SEQ),
    "swapdims": (lambda x: x.swapdims(1, 2), SEQ), "torch.swapdims": (lambda x: torch.swapdims(x, 1, 2), SEQ), "movedim": (lambda x: x.movedim(1, -1), MAP),
    "torch.movedim": (lambda x: torch.movedim(x, (1, 2), (2, 3)), MAP), "moveaxis": (lambda x: x.moveaxis(1, 2), SEQ),
    "torch.moveaxis": (lambda x: torch.moveaxis(x, 1, 2), SEQ),
    "expand": (lambda x: x.expand(-1, 4, -1), ALONG), "expand(tuple)": (lambda x: x.expand((x.shape[0], 4, 5)), ALONG),
    "expand(size=)": (lambda x: x.expand(size=(-1, 4, -1)), ALONG), "expand by an axis": (lambda x: x.expand(3, -1, -1, -1), ALONG),
    "expand_as": (lambda x, y: x.expand_as(y) * y, ((2, 1, 5), (2, 4, 5))), "broadcast_to": (lambda x: x.broadcast_to((x.shape[0], 4, 5)), ALONG),
    "torch.broadcast_to": (lambda x: torch.broadcast_to(x, (x.shape[0], 4, 5)), ALONG),
    "broadcast_tensors": (lambda x, y: torch.broadcast_tensors(x, y), ((2, 1, 5), (2, 4, 5))),
    "repeat": (lambda x: x.repeat(1, 2, 3), SEQ), "repeat(tuple)": (lambda x: x.repeat((1, 2, 1)), SEQ), "repeat(repeats=)": (lambda x: x.repeat(repeats=(1, 2, 1)), SEQ),
    "repeat by an axis": (lambda x: x.repeat(2, 1, 1, 1), SEQ), "repeat of the batch": (lambda x: x.repeat(2, 1, 1), SEQ),
    "tile": (lambda x: x.tile(1, 2, 1), SEQ), "tile(2)": (lambda x: x.tile(2), SEQ), "torch.tile": (lambda x: torch.tile(x, dims=(2, 1)), SEQ),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), SEQ), "torch.repeat_interleave": (lambda x: torch.repeat_interleave(x, 2, dim=-1), SEQ),
}
PARTS: dict[str, Spelling] = {
    "x[:, 0]": (lambda x: x[:, 0], MAP), "x[..., 0]": (lambda x: x[..., 0], MAP), "x[:, -1]": (lambda x: x[:, -1], MAP), "x[:, 1:3]": (lambda x: x[:, 1:3], MAP),
    "x[:, :, ::2]": (lambda x: x[:, :, ::2], MAP), "x[:, None]": (lambda x: x[:, None], MAP), "x[None]": (lambda x: x[None], MAP), "x[..., None]": (lambda x: x[..., None], MAP),
    "x[:, 0, None]": (lambda x: x[:, 0, None], MAP), "x[:, None, 0]": (lambda x: x[:, None, 0], MAP), "x[..., 1:, :]": (lambda x: x[..., 1:, :], MAP),
    "x[:, -3:]": (lambda x: x[:, -3:], MAP), "x[:, :-1]": (lambda x: x[:, :-1], MAP), "x[:, 1:100]": (lambda x: x[:, 1:100], MAP), "x[:, -100:2]": (lambda x: x[:, -100:2], MAP),
    "x[...]": (lambda x: x[...], MAP), "x[:]": (lambda x: x[:], MAP), "x[0]": (lambda x: x[0], MAP), "x[-1]": (lambda x: x[-1], MAP), "x[:1]": (lambda x: x[:1], MAP),
    "x[:, 0, :, 1]": (lambda x: x[:, 0, :, 1], MAP), "x[:, :size // 2]": (lambda x: x[:, : x.shape[1] // 2], MAP), "x[:, np.int64(2)]": (lambda x: x[:, np.int64(2)], MAP),
    "x[:, tensor]": (lambda x: x[:, torch.tensor([0, 2])], MAP), "x[:, list]": (lambda x: x[:, [0, -1]], MAP), "x[:, range]": (lambda x: x[:, range(2)], MAP),
    "x[:, mask]": (lambda x: x[:, torch.tensor([True, False, True, True])], MAP), "x[:, 0-d]": (lambda x: x[:, torch.tensor(1)], MAP),
    "index_select": (lambda x: x.index_select(1, torch.tensor([0, 2])), MAP), "torch.index_select": (lambda x: torch.index_select(x, dim=2, index=torch.tensor([1])), MAP),
    "narrow": (lambda x: x.narrow(1, 1, 2), MAP), "narrow(dim=)": (lambda x: x.narrow(dim=1, start=1, length=2), MAP), "narrow from the end": (lambda x: x.narrow(-1, -3, 2), MAP),
    "torch.narrow": (lambda x: torch.narrow(x, 1, 0, 3), MAP), "narrow_copy": (lambda x: x.narrow_copy(1, 1, 2), MAP), "select": (lambda x: x.select(1, 2), MAP),
    "select(dim=)": (lambda x: x.select(dim=1, index=0), MAP), "torch.select": (lambda x: torch.select(x, 1, -1), MAP),
    "split": (lambda x: x.split(2, 1), MAP), "split(list)": (lambda x: x.split([1, 3], dim=1), MAP), "split(-1)": (lambda x: x.split(3, -1), MAP),
    "torch.split": (lambda x: torch.split(x, 3, dim=1), MAP), "split(split_size=)": (lambda x: x.split(split_size=2, dim=1), MAP),
    "torch.split(sections=)": (lambda x: torch.split(x, split_size_or_sections=[1, 3], dim=1), MAP), "split_with_sizes": (lambda x: x.split_with_sizes([1, 3], 1), MAP),
    "chunk": (lambda x: x.chunk(2, 1), MAP), "chunk(3)": (lambda x: x.chunk(3, dim=1), MAP), "torch.chunk": (lambda x: torch.chunk(x, 2, dim=-1), MAP),
    "chunk(chunks=)": (lambda x: x.chunk(chunks=2, dim=1), MAP), "tensor_split": (lambda x: x.tensor_split(3, 1), MAP),
    "torch.tensor_split": (lambda x: torch.tensor_split(x, (1, 3), dim=1), MAP), "hsplit": (lambda x: x.hsplit(2), MAP), "dsplit": (lambda x: torch.dsplit(x, 2), MAP),
    "unbind": (lambda x: x.unbind(1), MAP), "torch.unbind": (lambda x: torch.unbind(x, dim=-1), MAP), "iteration": (lambda x: list(x.transpose(0, 1)), MAP),
    "unpacking": (lambda x: (lambda a, b, c, d: (a + b, c * d))(*x.transpose(0, 1)), MAP),
    "flip": (lambda x: x.flip(1), MAP), "flip(1, 2)": (lambda x: x.flip(1, 2), MAP), "flip(tuple)": (lambda x: x.flip((1, -1)), MAP), "flip(dims=)": (lambda x: x.flip(dims=(1,)), MAP),
    "torch.flip": (lambda x: torch.flip(x, [2]), MAP), "fliplr": (lambda x: x.fliplr(), MAP), "torch.flipud": (torch.flipud, MAP), "roll": (lambda x: torch.roll(x, 1, 1), MAP),
    "roll(shifts=)": (lambda x: x.roll(shifts=(2, -1), dims=(-1, 1)), MAP), "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), MAP), "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), MAP),
}
COPIES: dict[str, Spelling] = {
    "contiguous": (lambda x: x.permute(0, 2, 1).contiguous(), SEQ), "clone": (lambda x: x.clone(), SEQ), "torch.clone": (torch.clone, SEQ),
    "clone(memory_format=)": (lambda x: x.clone(memory_format=torch.contiguous_format), SEQ), "to(channels_last)": (lambda x: x.to(memory_format=torch.channels_last), MAP),
    "detach": (lambda x: x.detach() + x, SEQ), "torch.detach": (lambda x: torch.detach(x) + x, SEQ), "data": (lambda x: x.data + x, SEQ), "detach_": (lambda x: x.clone().detach_() + x, SEQ),
    "float": (lambda x: x.float(), SEQ), "to(dtype)": (lambda x: x.to(torch.float32), SEQ), "to(device)": (lambda x: x.to("cpu"), SEQ), "to(other)": (lambda x: x.to(x), SEQ),
    "cpu": (lambda x: x.cpu(), SEQ), "type": (lambda x: x.type(torch.float32), SEQ), "type_as": (lambda x: x.type_as(x), SEQ),
}
# fmt: on

SPELLINGS = ARITHMETIC | JOINS | REDUCTIONS | ACTIVATIONS | POOLS | PADS | VIEWS | PARTS | COPIES
WITHOUT_GRADIENT = {"view(dtype)"}
