"""diffkit's own parts, through the same door as everybody's."""

from __future__ import annotations

from diffkit import hookimpl


@hookimpl
def schedules() -> dict[str, str]:
    names = ["cosine", "linear", "sigmoid", "flow", "karras", "lognormal", "loglinear"]
    return {name: f"diffkit.core.schedules:{name}" for name in names}


@hookimpl
def predictions() -> dict[str, str]:
    return {name: f"diffkit.core.predictions:{name}" for name in ["eps", "x0", "v", "flow", "edm"]}


@hookimpl
def samplers() -> dict[str, str]:
    return {
        "euler": "diffkit.core.samplers:euler",
        "ddim": "diffkit.core.samplers:euler",
        "ancestral": "diffkit.core.samplers:ancestral",
        "ddpm": "diffkit.core.samplers:ancestral",
        "heun": "diffkit.core.samplers:heun",
        "dpmpp-2m": "diffkit.core.samplers:dpmpp_2m",
    }


@hookimpl
def backbones() -> dict[str, str]:
    return {"unet": "diffkit.backbones.unet:unet"}


@hookimpl
def datasets() -> dict[str, str]:
    return {
        "folder": "diffkit.datasets.folder:folder",
        "torchvision": "diffkit.datasets.torchvision:torchvision",
    }


@hookimpl
def extractors() -> dict[str, str]:
    return {name: f"diffkit.extractors.{name}:{name}" for name in ["lite0", "inception", "dinov2"]}


@hookimpl
def trackers() -> dict[str, str]:
    return {name: f"diffkit.trackers.{name}:{name}" for name in ["tensorboard", "wandb", "mlflow", "trackio"]}
