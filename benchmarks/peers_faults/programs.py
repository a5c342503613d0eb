"""Short trainings with other libraries, each written as its documentation does, and begun again by the same call.

`train(images, out, steps, lr)` trains a tiny network on a folder of PNG files, saves every second step, goes on from
the last checkpoint in `out` if there is one, and leaves the final weights in `out/final.pt`.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

SIZE, BATCH, EVERY, KEPT = 16, 16, 2, 2


class Folder(Dataset[Tensor]):
    """As the examples read a folder: `convert("RGB")`, resize, crop, scale."""

    def __init__(self, folder: Path) -> None:
        from torchvision import transforms

        self.paths = sorted(folder.rglob("*.*"))
        self.change = transforms.Compose(
            [
                transforms.Resize(SIZE),
                transforms.CenterCrop(SIZE),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        changed: Tensor = self.change(Image.open(self.paths[index]).convert("RGB"))
        return changed


def network() -> nn.Module:
    """diffusers' U-Net, tiny."""
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    return UNet2DModel(SIZE, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **blocks)


def diffusers_example(images: Path, out: Path, steps: int, lr: float = 1e-4) -> None:
    """examples/unconditional_image_generation/train_unconditional.py with --use_ema --checkpointing_steps 2
    --checkpoints_total_limit 2 --resume_from_checkpoint latest."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    accelerator, model, scheduler = Accelerator(cpu=True), network(), DDPMScheduler(1000)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    accelerator.register_for_checkpointing(ema)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.95, 0.999), weight_decay=1e-6)
    loader = DataLoader(Folder(images), batch_size=BATCH, shuffle=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    step, first = 0, 0
    if path := latest(out):
        accelerator.load_state(str(out / path))
        step = int(path.split("-")[1])
        first = step % len(loader)
    while step < steps:
        for batch in accelerator.skip_first_batches(loader, first) if first else loader:
            first = 0
            noise, t = torch.randn_like(batch), torch.randint(0, 1000, (len(batch),))
            loss = F.mse_loss(model(scheduler.add_noise(batch, noise, t), t).sample, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            step += 1
            if step % EVERY == 0:
                old = sorted((d for d in os.listdir(out) if d.startswith("checkpoint-")), key=number)
                for path in old[: max(0, len(old) - KEPT + 1)]:  # before the new one is there, as in the example
                    shutil.rmtree(out / path)
                accelerator.save_state(str(out / f"checkpoint-{step}"))
            if step >= steps:
                break
    torch.save(accelerator.unwrap_model(model).state_dict(), out / "final.pt")


def accelerate_states(images: Path, out: Path, steps: int, lr: float = 1e-4) -> None:
    """accelerate's guide to checkpoints: automatic naming, a total limit, load_state(), skip_first_batches."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration, set_seed

    set_seed(0)
    kept = ProjectConfiguration(str(out), automatic_checkpoint_naming=True, total_limit=KEPT)
    accelerator, model = Accelerator(cpu=True, project_config=kept), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    loader = DataLoader(Folder(images), batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    place = Place()
    accelerator.register_for_checkpointing(place)
    if (out / "checkpoints").is_dir() and os.listdir(out / "checkpoints"):
        accelerator.load_state()
        kept.iteration = 1 + max(map(number, (d.replace("_", "-") for d in os.listdir(out / "checkpoints"))))
    first = place.step % len(loader)
    while place.step < steps:
        for batch in accelerator.skip_first_batches(loader, first) if first else loader:
            first = 0
            noise, t = torch.randn_like(batch), torch.rand(len(batch))
            mixed = (1 - t.view(-1, 1, 1, 1)) * batch + t.view(-1, 1, 1, 1) * noise
            accelerator.backward(F.mse_loss(model(mixed, 1000 * t).sample, noise - batch))
            optimizer.step()
            optimizer.zero_grad()
            place.step += 1
            if place.step % EVERY == 0:
                accelerator.save_state()
            if place.step >= steps:
                break
    torch.save(accelerator.unwrap_model(model).state_dict(), out / "final.pt")


class Place:
    """How far a training has come."""

    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def denoising_diffusion(images: Path, out: Path, steps: int, lr: float = 1e-4) -> None:
    """denoising-diffusion-pytorch's Trainer, with `load` of its last milestone."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    torch.manual_seed(0)
    diffusion = GaussianDiffusion(
        Unet(dim=8, dim_mults=(1, 2), flash_attn=False), image_size=SIZE, timesteps=10, sampling_timesteps=2
    )
    options = {"train_num_steps": steps, "save_and_sample_every": EVERY, "num_samples": 1, "calculate_fid": False}
    trainer = Trainer(diffusion, str(images), train_batch_size=BATCH, train_lr=lr, results_folder=str(out), **options)
    found = sorted(int(path.stem.split("-")[1]) for path in out.glob("model-*.pt"))
    if found:
        trainer.load(found[-1])
    trainer.train()
    torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), out / "final.pt")


PROGRAMS: dict[str, Callable[..., None]] = {
    "diffusers": diffusers_example,
    "denoising-diffusion-pytorch": denoising_diffusion,
    "accelerate": accelerate_states,
}


def latest(out: Path) -> str | None:
    """The checkpoint with the highest number, as the example takes it."""
    found = sorted((d for d in os.listdir(out) if d.startswith("checkpoint-")), key=number)
    return found[-1] if found else None


def number(name: str) -> int:
    return int(name.split("-")[1])


def newest_files(name: str, out: Path) -> list[Path]:
    """The files of the newest checkpoint."""
    if name == "denoising-diffusion-pytorch":
        return sorted(out.glob("model-*.pt"), key=lambda path: number(path.stem))[-1:]
    pattern = "checkpoint-*" if name == "diffusers" else "checkpoints/checkpoint_*"
    folders = sorted(out.glob(pattern), key=lambda path: number(path.name.replace("_", "-")))
    return sorted(path for path in folders[-1].iterdir() if path.is_file())


def quietly(name: str, *arguments: Any, **options: Any) -> None:
    """Run a program, its progress unseen."""
    with contextlib.redirect_stderr(io.StringIO()):
        PROGRAMS[name](*arguments, **options)
