"""The trainers that diffkit is measured against, as generators that yield after every optimiser step.

Each trains the module it is given on the same folder of PNG files. `stock` is the documented command with its defaults,
`switched` has every documented flag for speed on, `tuned` also what a careful user would change in the peer's code:
images decoded once and kept in memory, a fused optimiser, the average of the weights by foreach, no transfer of the
loss at each step, on a GPU also channels last, compiled, and cuDNN's trial of its kernels. Follows diffusers'
examples/unconditional_image_generation/train_unconditional.py, denoising-diffusion-pytorch's Trainer and k-diffusion's
train.py.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import only_steps
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

LR = 1e-4


class Folder(Dataset[Tensor]):
    """The files of a folder, read, resized, mirrored and scaled at every access, as the peers' examples do."""

    def __init__(self, folder: Path, size: int) -> None:
        from torchvision import transforms

        self.paths = sorted(folder.rglob("*.png"))
        self.change = transforms.Compose(
            [
                transforms.Resize(size),
                transforms.CenterCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            changed: Tensor = self.change(image.convert("RGB"))
        return changed


def cached(folder: Path, size: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of the same, decoded once and kept on the device."""
    plain = Folder(folder, size)
    images = torch.stack([plain[index] for index in range(len(plain))]).to(device)
    while True:
        for indices in torch.randperm(len(images), device=device).split(batch)[: len(images) // batch]:
            chosen = images[indices]
            mirrored = torch.rand(len(chosen), 1, 1, 1, device=device) < 0.5
            yield torch.where(mirrored, chosen.flip(-1), chosen)


def repeated(loader: Any) -> Iterator[Tensor]:
    while True:
        yield from loader


def alone(steps: Iterator[None]) -> Iterator[None]:
    """What a process has once is each trainer's own in its turn: accelerate's state, cuDNN's trial of kernels."""
    from accelerate.state import AcceleratorState, GradientState

    places = [AcceleratorState._shared_state, GradientState._shared_state]
    own: list[dict[str, Any]] = [{}, {}]
    tries = False
    while True:
        for place, state in zip(places, own, strict=True):
            place.clear()
            place.update(state)
        others = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = tries
        try:
            next(steps)
        finally:
            tries, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, others
        own = [dict(place) for place in places]
        yield


def diffusers(
    leg: str, network: nn.Module, folder: Path, size: int, batch: int, device: torch.device, workers: int = 2
) -> Iterator[None]:
    """The loop of diffusers' unconditional example; stock is float32, without an average, decoding in the process."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(mixed_precision="no" if leg == "stock" else "bf16", cpu=device.type == "cpu")
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    fused = {"fused": True} if leg == "tuned" else {}
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=(0.95, 0.999), weight_decay=1e-6, **fused)
    warmup = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100_000)
    average: Any = None
    if leg == "switched":
        average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        average.to(device)
    if leg == "tuned":
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            network.to(memory_format=torch.channels_last)
            network = torch.compile(network, dynamic=False)  # type: ignore[assignment]
        network, optimizer = accelerator.prepare(network, optimizer)
        average = [parameter.detach().clone() for parameter in network.parameters()]
        data = cached(folder, size, batch, device)
    else:
        loader = DataLoader(
            Folder(folder, size), batch, shuffle=True, num_workers=0 if leg == "stock" else workers, drop_last=True
        )
        network, optimizer, loader, warmup = accelerator.prepare(network, optimizer, loader, warmup)
        data = repeated(loader)
    for clean in data:
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device)
        if leg == "tuned" and device.type == "cuda":
            clean = clean.contiguous(memory_format=torch.channels_last)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)  # type: ignore[arg-type]
        loss = F.mse_loss(network(noisy, timesteps).sample.float(), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        if leg == "switched":
            average.step(network.parameters())
        if leg == "tuned":
            torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 1e-3)
        else:
            loss.detach().item()  # for its log
        yield


def lucidrains(
    leg: str, network: nn.Module, folder: Path, size: int, batch: int, device: torch.device, results: Path
) -> Iterator[None]:
    """denoising-diffusion-pytorch's own Trainer; switched is bfloat16 (its amp is float16 unless told)."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    trainer = Trainer(
        GaussianDiffusion(network, image_size=size),
        str(folder),
        train_batch_size=batch,
        train_lr=LR,
        save_and_sample_every=10**9,
        results_folder=str(results),
        amp=leg != "stock",
        mixed_precision_type="bf16",
        calculate_fid=False,
    )
    while True:
        trainer.train_num_steps = trainer.step + 1
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        yield


def k_diffusion_modules() -> tuple[Any, Any]:
    """Its layers and utils, without all that its package imports at once."""
    found = importlib.util.find_spec("k_diffusion")
    assert found is not None
    sys.modules.setdefault("k_diffusion", importlib.util.module_from_spec(found))
    return importlib.import_module("k_diffusion.layers"), importlib.import_module("k_diffusion.utils")


def k_diffusion(
    leg: str, network: nn.Module, folder: Path, size: int, batch: int, device: torch.device, workers: int = 2
) -> Iterator[None]:
    """k-diffusion's Denoiser (its loss, preconditioning and density) in the loop of its train.py."""
    from accelerate import Accelerator

    layers, utils = k_diffusion_modules()

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
            answer: Tensor = self.network(x, sigma.log() / 4).sample
            return answer

    accelerator = Accelerator(mixed_precision="no" if leg == "stock" else "bf16", cpu=device.type == "cpu")
    denoiser = layers.Denoiser(Inner(), sigma_data=0.5).to(device)
    average = copy.deepcopy(denoiser)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=LR, betas=(0.95, 0.999), weight_decay=1e-3)
    loader = DataLoader(Folder(folder, size), batch, shuffle=True, num_workers=workers, drop_last=True)
    denoiser, optimizer, loader = accelerator.prepare(denoiser, optimizer, loader)
    for clean in repeated(loader):
        noise = torch.randn_like(clean)
        sigma = utils.rand_log_normal([len(clean)], -1.2, 1.2, device=clean.device)
        with accelerator.autocast():
            loss = denoiser.loss(clean, noise, sigma).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        utils.ema_update(denoiser, average, 0.999)
        loss.item()
        yield


class AsBackbone(nn.Module):
    """A peer's network as diffkit calls one: a noise level where it expects a time."""

    def __init__(self, network: nn.Module, times: float, unpack: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network, self.times, self.unpack = network, times, unpack

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.unpack(self.network(x, c_noise * self.times))


def diffkit(network: nn.Module, data: Path, batch: int, device: torch.device, precision: str) -> Iterator[None]:
    """diffkit's own loop, with the defaults of `diffkit train` for everything but the network.

    On a GPU these are found by trial: cuDNN's kernels, the layout in memory, and whether to compile.
    """
    from functools import partial

    from diffkit.compose.machine import fastest
    from diffkit.core.denoiser import Denoiser, squared_error
    from diffkit.core.predictions import edm
    from diffkit.core.schedules import cosine, over_range
    from diffkit.engine.batches import Batches
    from diffkit.engine.devices import autocast, choose_kernels, forget_peak
    from diffkit.engine.resident import budget, resident
    from diffkit.engine.speed import EAGER, ON_A_GPU, prepared
    from diffkit.engine.store import Store
    from diffkit.engine.train import Recipe, State, train
    from diffkit.interfaces import ImageSpec

    store = Store.open(data)
    recipe = Recipe(batch, batch, LR, 10_000, (0.9, 0.99), 0.0, 1.0, 500_000.0, 0)
    under, way = autocast(device, precision), EAGER
    unlabelled = ImageSpec(store.spec.channels, store.spec.height, store.spec.width)
    network.to(device)
    choose_kernels(device, exact=False)
    if device.type == "cuda":
        way = fastest(network, unlabelled, batch, under, ON_A_GPU)[0]
        forget_peak(device)
    run_as = prepared(network, way)
    state = State(network, recipe)
    kept = resident(store, ("images",), device, budget(device))
    prediction = partial(edm, sigma_data=store.sigma_data)
    events = train(
        state,
        Denoiser(run_as, prediction, under),
        Batches(store, store.spec, 0, True, 0.0, resident=kept),
        over_range(cosine, 0.002, 80.0),
        squared_error,
        recipe,
        report_every=1 if device.type == "cpu" else max(1, 2048 // batch),
    )
    for _ in only_steps(events):
        yield
