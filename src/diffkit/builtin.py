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
    modules = {
        "onestep": ["euler", "ancestral", "heun", "edm-stochastic", "dpm2", "dpmpp-2s"],
        "multistep": ["dpmpp-2m", "dpmpp-3m", "dpmpp-2m-sde", "dpmpp-3m-sde", "unipc", "deis", "ipndm", "lms"],
        "adaptive": ["adaptive"],
    }
    found = {
        name: f"diffkit.core.samplers.{module}:{name.replace('-', '_')}"
        for module, names in modules.items()
        for name in names
    }
    return {**found, "ddim": found["euler"], "ddpm": found["ancestral"]}


@hookimpl
def weightings() -> dict[str, str]:
    names = ["min-snr", "soft-min-snr", "p2", "sigmoid"]
    return {name: f"diffkit.core.weightings:{name.replace('-', '_')}" for name in names}


@hookimpl
def tasks() -> dict[str, str]:
    names = ["super-resolution", "inpaint", "colorize", "translate"]
    return {name: f"diffkit.core.tasks:{name.replace('-', '_')}" for name in names}


@hookimpl
def backbones() -> dict[str, str]:
    return {"unet": "diffkit.backbones.unet:unet", "unet-classic": "diffkit.backbones.unet:unet_classic"}


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
