"""The torch side of lowbit.py, which starts it: torchao's PARQ on the same nets, initial values and batches.

Needs torch, torchao and numpy, and nothing of this library.
"""

import argparse
import json
import math
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch
from torchao.prototype.parq.optim import ProxHardQuant, ProxPARQ, QuantOptimizer
from torchao.prototype.parq.quant import (
    LSBQuantizer,
    MaxUnifQuantizer,
    TernaryUnifQuantizer,
    UnifQuantizer,
)

BITS = {"ternary": 0, "1": 1, "2": 2, "3": 3, "4": 4}


def make_quantizer(name: str, width: str) -> Any:
    if name == "uniform":
        return TernaryUnifQuantizer() if width == "ternary" else UnifQuantizer()
    return {
        "max": MaxUnifQuantizer,
        "lsbq": LSBQuantizer,
        "lsbq optimal": lambda: LSBQuantizer(optimal=True),
    }[name]()


def make_model(params: dict[str, np.ndarray]) -> torch.nn.Sequential:
    """The net, from kernels in linen's layout."""
    layers: list[torch.nn.Module] = []
    for i in range(len(params) // 2):
        kernel, bias = params[f"kernel{i}"], params[f"bias{i}"]
        layer = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel.T))
            layer.bias.copy_(torch.from_numpy(bias))
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def make_optimizer(model: torch.nn.Sequential, job: dict[str, Any], steps: int) -> Any:
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    if job["width"] == "float":
        return torch.optim.Adam([{"params": weights}, {"params": biases}], lr=1e-3)
    groups = [{"params": weights, "quant_bits": BITS[job["width"]]}, {"params": biases}]
    prox = ProxHardQuant()
    if job.get("anneal"):
        start, end, steepness = job["anneal"]
        prox = ProxPARQ(round(start * steps), round(end * steps), steepness=steepness)
    quantizer = make_quantizer(job["quantizer"], job["width"])
    return QuantOptimizer(
        torch.optim.Adam(groups, lr=1e-3), quantizer, prox, quant_per_channel=True
    )


def step(
    model: torch.nn.Sequential, optimizer: Any, x: torch.Tensor, y: torch.Tensor, rate: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()


def cosine(at: int, steps: int) -> float:
    return 1e-3 * 0.5 * (1 + math.cos(math.pi * at / steps))


def levels(model: torch.nn.Sequential) -> int:
    """The largest number of distinct weights in an output channel."""
    weights = [p.detach() for p in model.parameters() if p.ndim == 2]
    return max(len(torch.unique(row)) for weight in weights for row in weight)


def train(job: dict[str, Any], data: list[torch.Tensor], start: pathlib.Path) -> dict[str, Any]:
    train_x, train_y, test_x, test_y = data
    with np.load(start) as arrays:
        batches = torch.from_numpy(arrays["batches"].astype(np.int64))
        model = make_model({k: arrays[k] for k in arrays.files if k != "batches"})
    optimizer = make_optimizer(model, job, len(batches))
    begin = time.perf_counter()
    for i, batch in enumerate(batches):
        x = train_x[batch].float() / 255
        step(model, optimizer, x, train_y[batch], cosine(i, len(batches)))
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        found = model(test_x.float() / 255).argmax(-1)
    accuracy = (found == test_y).double().mean().item()
    return {**job, "accuracy": accuracy, "levels": levels(model), "seconds": seconds}


def measure(jobs: list[dict[str, Any]], start: pathlib.Path, rounds: int, steps: int) -> Any:
    """Seconds per step of each job in each round; the jobs take turns. Annealing takes a round."""
    with np.load(start) as arrays:
        params = {k: arrays[k] for k in arrays.files if k != "batches"}
    torch.manual_seed(0)
    x, y = torch.randn(256, 784), torch.randint(10, (256,))
    times: list[list[float]] = [[] for _ in jobs]
    for turn in range(rounds + 1):
        for job, found in zip(jobs, times, strict=True):
            model = make_model(params)
            optimizer = make_optimizer(model, job, steps)
            begin = time.perf_counter()
            for i in range(steps):
                step(model, optimizer, x, y, cosine(i, steps))
            if turn:  # the first warms up
                found.append((time.perf_counter() - begin) / steps)
    return [{**job, "times": found} for job, found in zip(jobs, times, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("request", type=pathlib.Path, help="JSON that lowbit.py wrote")
    args = parser.parse_args()
    request = json.loads(args.request.read_text())
    torch.set_num_threads(request["threads"])
    folder = args.request.parent
    if "rounds" in request:
        start = folder / request["jobs"][0]["start"]
        found = measure(request["jobs"], start, request["rounds"], request["steps"])
        (folder / request["result"]).write_text(json.dumps(found))
        return
    with np.load(folder / request["data"]) as arrays:
        names = ("train_x", "train_y", "test_x", "test_y")
        data = [torch.from_numpy(arrays[name]) for name in names]
    data[1], data[3] = data[1].long(), data[3].long()
    for job in request["jobs"]:
        result = train(job, data, folder / job["start"])
        # Complete or absent, so that an interrupted run can be resumed.
        path = folder / job["result"]
        path.with_suffix(".part").write_text(json.dumps(result))
        path.with_suffix(".part").rename(path)
        print(job["result"], f"{result['accuracy']:.4f}", file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
