"""Real data out of packages: images, speech and the movements of a watch. Nothing is downloaded by the benchmark.

Speech: mel bands m_j of the power spectrum of 32 ms frames, every 25 ms, as (log(m_j + 1e-6) - mean) / deviation    (1)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linger.demo_data import Split
from linger.errors import LingerError

PROMPTS = Path("/usr/share/asterisk/sounds")  # Debian's asterisk-core-sounds-{en,es,fr,it,ru}-gsm
RATE, FRAME, HOP, BANDS = 8000, 256, 200, 40  # of the prompts: Hz, samples, samples, mel bands
LOUD = 1e-3  # mean square below which a second of speech is a pause
STEPS, EVERY = 64, 2  # of the watch: time steps of a window, and which samples are taken of 50 Hz
HELD_OUT = 4  # every fourth recording is for testing


@cache
def speech() -> Split:
    """Seconds of telephone prompts, (N, 40 bands, 39 frames), and which of five languages (one speaker each) is spoken.

    Raises:
        LingerError: soundfile or the prompts are not installed.
    """
    folders = sorted(p for p in PROMPTS.glob("*_*") if p.is_dir())
    if len(folders) < 2:
        raise LingerError(
            f"accuracy: found no prompts in {PROMPTS}, allowed are those of Debian's asterisk-core-sounds-*-gsm; install "
            "them, or leave the task out with --tasks"
        )
    train: list[tuple[Tensor, int]] = []
    test: list[tuple[Tensor, int]] = []
    for label, folder in enumerate(folders):
        for i, path in enumerate(sorted(folder.rglob("*.gsm"))):
            into = test if i % HELD_OUT == 0 else train
            into += [(second, label) for second in _seconds(path)]
    x, y = _log_mel(torch.stack([s for s, _ in train])), torch.tensor([label for _, label in train])
    test_x, test_y = _log_mel(torch.stack([s for s, _ in test])), torch.tensor([label for _, label in test])
    mean, deviation = x.mean(), x.std()
    return (x - mean) / deviation, y, (test_x - mean) / deviation, test_y


def frames() -> Split:
    """The same with time first: (N, 39 frames, 40 bands)."""
    x, y, test_x, test_y = speech()
    return x.transpose(1, 2).contiguous(), y, test_x.transpose(1, 2).contiguous(), test_y


def _seconds(path: Path) -> list[Tensor]:
    """The loud seconds of a recording, each (8000,)."""
    try:
        import soundfile
    except ImportError:
        raise LingerError("accuracy: found no soundfile; pip install 'linger-qat[benchmark]'") from None
    sound, _ = soundfile.read(path, samplerate=RATE, channels=1, format="RAW", subtype="GSM610", dtype="float32")
    pieces = torch.from_numpy(sound[: len(sound) // RATE * RATE]).view(-1, RATE)
    return [piece for piece in pieces if piece.pow(2).mean() > LOUD]


def _log_mel(sound: Tensor) -> Tensor:
    """(N, 8000) -> (N, 40, 39), equation (1) before mean and deviation."""
    window = torch.hann_window(FRAME)
    power = torch.stft(sound, FRAME, HOP, window=window, center=False, return_complex=True).abs().pow(2)
    return torch.log(torch.from_numpy(_bands()) @ power + 1e-6)


def _bands() -> np.ndarray:
    """Triangles on the mel scale, (40, 129)."""
    mel = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = np.linspace(0, RATE / 2, FRAME // 2 + 1)
    up = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(up, down)).astype(np.float32)


@cache
def watch() -> Split:
    """Windows (N, 64 steps, 6 axes) of a watch's sensors at 25 Hz, and which of seven exercises its wearer does.

    The first three quarters of every recording are for training, the last quarter for testing.

    Raises:
        LingerError: seglearn is not installed.
    """
    try:
        from seglearn.datasets import load_watch
    except ImportError:
        raise LingerError("accuracy: found no seglearn; pip install 'linger-qat[benchmark]'") from None
    found = load_watch()
    train: list[tuple[Tensor, int]] = []
    test: list[tuple[Tensor, int]] = []
    for series, label in zip(found["X"], found["y"], strict=True):
        steps = torch.from_numpy(np.asarray(series, np.float32))[::EVERY]
        border = len(steps) * 3 // 4
        train += [(w, int(label)) for w in _windows(steps[:border], STEPS // 4)]
        test += [(w, int(label)) for w in _windows(steps[border:], STEPS // 4)]
    x, test_x = torch.stack([w for w, _ in train]), torch.stack([w for w, _ in test])
    mean, deviation = x.mean((0, 1)), x.std((0, 1))
    y, test_y = torch.tensor([label for _, label in train]), torch.tensor([label for _, label in test])
    return (x - mean) / deviation, y, (test_x - mean) / deviation, test_y


def _windows(steps: Tensor, stride: int) -> list[Tensor]:
    return [steps[i : i + STEPS] for i in range(0, len(steps) - STEPS + 1, stride)]
