"""The torch side of optimizer_state.py, which starts it: 8- and 4-bit Adam of two libraries.

Needs torch, torchao and bitsandbytes, and nothing of this library.
"""

import json
from collections.abc import Callable
from typing import Any

import bitsandbytes
import numpy as np
import torch
import torchao.optim

SHAPE, STEPS, SEEDS = (1024, 1024), 50, 3
RATE = 1e-3
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "bitsandbytes, 8 bits": lambda p: bitsandbytes.optim.Adam8bit(p, lr=RATE),
    "torchao, 8 bits": lambda p: torchao.optim.Adam8bit(p, lr=RATE),
    "torchao, 4 bits": lambda p: torchao.optim.Adam4bit(p, lr=RATE),
}


def nearness(name: str, seed: int, together: bool) -> tuple[float, float, float]:
    """Error and relative error as in optimizer_state.py, and the state's bytes per weight."""
    torch.manual_seed(seed)
    exact = torch.nn.Parameter(0.1 * torch.randn(SHAPE))
    found = torch.nn.Parameter(exact.data.clone())
    float_adam, adam = torch.optim.Adam([exact], lr=RATE), OPTIMIZERS[name]([found])
    errors, relatives = [], []
    for _ in range(STEPS):
        grads = 0.01 * torch.randn(SHAPE)
        exact.grad, found.grad = grads.clone(), grads.clone()
        float_adam.step()
        adam.step()
        error = (exact.data - found.data).abs()
        errors.append(error.mean().item())
        relatives.append((error / (exact.data.abs() + 1e-9)).mean().item())
        if together:
            found.data.copy_(exact.data)
    size = sum(bytes_of(x) for x in adam.state[found].values()) / exact.numel()
    if together:
        return max(errors), float(np.median(relatives)), size
    return errors[-1], relatives[-1], size


def bytes_of(x: Any) -> int:
    """Bytes of a tensor, or of the tensors that make up a tensor subclass, without codebooks."""
    if isinstance(x, torch.Tensor) and hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()
        return sum(bytes_of(getattr(x, name)) for name in names if name != "qmap")
    if not isinstance(x, torch.Tensor) or x.numel() <= 256:
        return 0
    return x.numel() * x.element_size()


def main() -> None:
    found = {}
    for name in OPTIMIZERS:
        steps = np.mean([nearness(name, seed, True) for seed in range(SEEDS)], axis=0)
        last = np.mean([nearness(name, seed, False) for seed in range(SEEDS)], axis=0)
        found[name] = [float(x) for x in (steps[2], steps[0], steps[1], last[0])]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
