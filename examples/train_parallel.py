"""Trains a byte-level mixture-of-experts language model on several processes, then again on one, and compares.

    torchrun --nproc-per-node 2 examples/train_parallel.py --quick            one minute on two CPU cores
    torchrun --nproc-per-node 4 examples/train_parallel.py --moe gshard       mixtral, switch or gshard
    torchrun --nnodes 2 --nproc-per-node 8 ... examples/train_parallel.py     on GPUs the processes talk by NCCL

Every process holds a part of each sequence (pyext.distributed.context_parallel_attention: keys and values travel around
a ring) and a part of the experts (pyext.distributed.ExpertParallel: tokens travel to their experts and back); all else
is DistributedDataParallel. So neither the length of a sequence nor the number of experts is bound by one device.

Then the first process trains the same model alone. The losses must agree up to rounding, or the run fails: routing,
dropped tokens and losses are those of the whole batch. Printed at the end: what each process held, tokens per second,
and how far apart the two loss curves ever were. One picture shows both curves.

moe       a token's experts                                  capacity                         experts
mixtral   the best two, weights that sum to 1                none: nothing is dropped         SwiGLU
switch    the best                                           1.25 times the even share        ReLU
gshard    the best two, the second one with a probability    1.25 times the even share        ReLU

The text is that of train_lm.py; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from side_by_side import Curve, apart, corpus, draw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from train_lm import VOCABULARY, Batch, Config, batches

import pyext
from pyext.distributed import ExpertParallel, clip_grad_norm_, context_parallel_attention, expert_parameters
from pyext.distributed import shard_sequence as shard

MIXTURES = {
    "mixtral": dict(top_k=2, policy="softmax_topk", renormalize=True, activation="swiglu"),
    "switch": dict(top_k=1, policy="switch", capacity_factor=1.25, activation="relu"),
    "gshard": dict(top_k=2, policy="gshard", capacity_factor=1.25, activation="relu"),
}
BALANCE, Z = 0.01, 0.001  # how much the losses of the routers count
TOLERANCE = 1e-3  # nats per byte between the curves; rounding makes about 1e-5 of it


# --- The model: what differs between one process and many is in two places, Attention and Experts --------------------


class Attention(nn.Module):
    """Causal, with rotary positions."""

    def __init__(self, config: Config, ep: ExpertParallel | None):
        super().__init__()
        self.heads, self.ep = config.heads, ep
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.rotary = pyext.nn.RotaryEmbedding(config.width // config.heads)
        self.length = config.length

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        positions = torch.arange(self.length, device=x.device)
        cos, sin = self.rotary(positions if self.ep is None else shard(positions, 0, group=self.ep.group))
        query, key = pyext.rotary(query, cos, sin), pyext.rotary(key, cos, sin)
        if self.ep is None:
            out = pyext.attention(query, key, value, is_causal=True)
        else:
            out = context_parallel_attention(query, key, value, is_causal=True, group=self.ep.group)
        return self.out(out.transpose(1, 2).flatten(-2))


class Experts(nn.Module):
    """The mixture. One process orders the tokens by `places`, the positions that each of many holds: in turn they claim
    the slots of experts with a capacity."""

    def __init__(self, config: Config, mixture: str, experts: int, ep: ExpertParallel | None, places: list):
        super().__init__()
        self.places, self.ep = places, ep
        self.moe = pyext.nn.MoE(config.width, 2 * config.width, experts, expert_parallel=ep, **MIXTURES[mixture])

    def forward(self, x, generator):
        if self.ep is not None:
            return self.moe(x, generator=generator, return_routing=True)
        parts = torch.cat([x[:, place] for place in self.places])
        out, routing = self.moe(parts, generator=generator, return_routing=True)
        back = torch.cat(self.places).argsort()
        return torch.cat(out.chunk(len(self.places)), dim=1)[:, back], routing


class Block(nn.Module):
    def __init__(self, config, mixture, experts, ep, places):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(config.width, eps=1e-6) for _ in range(2))
        self.attention, self.experts = Attention(config, ep), Experts(config, mixture, experts, ep, places)

    def forward(self, x, generator):
        x = x + self.attention(self.norms[0](x))
        out, routing = self.experts(self.norms[1](x), generator)
        return x + out, BALANCE * routing.balance_loss + Z * routing.z_loss


class Model(nn.Module):
    """Bytes in, loss out: of the positions that this process holds, and of the routers for all of them."""

    def __init__(self, config, mixture, experts, ep, places):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config, mixture, experts, ep, places) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)

    def forward(self, inputs, targets, generator):
        x, losses = self.embedding(inputs), 0.0
        for block in self.blocks:
            x, loss = block(x, generator)
            losses = losses + loss
        logits = self.head(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets.flatten()) + losses


# --- Training -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Run(Curve):
    """A model and how it is trained."""

    model: Model  # itself
    wrapped: nn.Module  # as it is called
    ep: ExpertParallel | None = None

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def make_runs(args: argparse.Namespace, config: Config, device: torch.device) -> tuple[Run, Run]:
    """(on all processes, on one), of the same weights: one seed makes the same experts however they are divided."""
    # A group of its own: beside what DDP does during backward. Capacities and losses are those of all tokens.
    ep = ExpertParallel(dist.new_group(), average=True, together=True)
    own = shard(torch.arange(config.length, device=device), 0, group=ep.group)
    places = [torch.empty_like(own) for _ in range(ep.size)]
    dist.all_gather(places, own)
    models = []
    for parallel in (ep, None):
        torch.manual_seed(args.seed)
        models.append(Model(config, args.moe, args.experts, parallel, places).to(device))
    many, one = models
    # Experts are not the same on all processes, and their gradients are complete.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(many, list(expert_parameters(many)))
    wrapped = DistributedDataParallel(many)
    return Run(f"{ep.size} process(es)", model=many, wrapped=wrapped, ep=ep), Run("1 process", model=one, wrapped=one)


def train(run: Run, args: argparse.Namespace, config: Config, text: torch.Tensor, device: torch.device) -> None:
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator(device).manual_seed(args.seed)  # one state on all processes
    stream: Iterator[Batch] = batches(text, config, args.batch, args.seed)
    hidden = None if dist.get_rank() == 0 else True  # None: hidden where there is no terminal
    for step in tqdm(range(args.steps), desc=run.name, unit="step", disable=hidden):
        start = time.perf_counter()
        batch = next(stream)
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        if run.ep is not None:
            inputs, targets = (shard(part, 1, group=run.ep.group) for part in (inputs, targets))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((step + 1) / max(1, args.steps // 10), 1.0)
        loss = run.wrapped(inputs, targets, generator)
        loss.backward()
        clip_grad_norm_(run.model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if run.ep is not None:
            dist.all_reduce(loss)
            loss /= run.ep.size
        run.losses.append(loss.item())
        run.rates.append(batch.tokens / (time.perf_counter() - start))


# --- The report -----------------------------------------------------------------------------------------------------


def report(runs: tuple[Run, Run], args: argparse.Namespace) -> None:
    print(f"{'':14s}  {'parameters':>10s}  {'bytes of text':>13s}  {'tokens/s':>9s}  loss, nats per byte")
    for run in runs:
        length = args.length // (run.ep.size if run.ep else 1)
        print(
            f"{run.name:14s}  {run.parameters / 1e6:8.2f} M  {f'{args.batch} x {length}':>13s}  {run.speed:9,.0f}  "
            f"{run.losses[0]:.4f} -> {run.losses[-1]:.4f}"
        )
    print(f"Parameters and text are per process. Losses: {apart(runs)[0]:.1e} apart at most, over {args.steps} steps.")
    print(f"Picture: {args.out}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moe", choices=MIXTURES, default="mixtral")
    parser.add_argument("--quick", action="store_true", help="fewer steps: about a minute")
    parser.add_argument("--steps", type=int, help="optimiser steps (default 100, quick 20)")
    parser.add_argument("--batch", type=int, default=2, help="texts per step")
    parser.add_argument("--length", type=int, default=1024, help="bytes per text, on all processes together")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the picture (default train_parallel_<moe>.png)")
    args = parser.parse_args(argv)
    args.steps = args.steps or (20 if args.quick else 100)
    args.out = args.out or Path(f"train_parallel_{args.moe}.png")
    for name in ("steps", "batch", "length", "layers", "width", "heads", "experts", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.width % (2 * args.heads):
        parser.error(f"--width must be a multiple of twice --heads, got {args.width} and {args.heads}")
    return args


def start() -> torch.device:
    """Join the processes that torchrun started; by itself be the only one. Returns this process' device."""
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, **alone)
    return device


def main(argv: list[str] | None = None) -> tuple[Run, Run]:
    args = parse(argv)
    device = start()
    try:
        ranks, is_first = dist.get_world_size(), dist.get_rank() == 0
        if args.length % (2 * ranks):
            raise SystemExit(f"--length must be a multiple of {2 * ranks} for {ranks} process(es), got {args.length}")
        config = Config("gpt2", args.layers, args.width, args.heads, args.length)
        text, _ = corpus()
        runs = make_runs(args, config, device)
        torch.set_num_threads(args.threads)
        train(runs[0], args, config, text, device)
        if is_first:
            train(runs[1], args, config, text, device)
            draw(runs, f"{args.moe}, {args.experts} experts, length {args.length}", args.out)
            report(runs, args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if is_first and apart(runs)[0] > TOLERANCE:
        raise SystemExit(f"The losses are {apart(runs)[0]:.1e} apart, more than {TOLERANCE:.0e}.")
    return runs


if __name__ == "__main__":
    main()
