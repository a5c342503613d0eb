"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffkit.cli.output import reserve

PART = "NAME[:KEY=VALUE,...]"
MEASURE, MACHINE = "How it is measured", "Machine"
MOST_IMAGES, MOST_STEPS, MOST_SEED = 10_000_000, 100_000, 2**63 - 1

Data = Annotated[
    Path | None,
    typer.Option(help="Real images: a prepared set or a folder; of a run, its own.", rich_help_panel=MEASURE),
]
Against = Annotated[str, typer.Option(help="Which real images: all, train or holdout.", rich_help_panel=MEASURE)]
Extractor = Annotated[
    str, typer.Option(metavar=PART, help="Features: lite0, inception, dinov2.", rich_help_panel=MEASURE)
]
Metric = Annotated[str, typer.Option(help="kid or frechet.", rich_help_panel=MEASURE)]
Count = Annotated[
    int, typer.Option("-n", "--count", min=20, max=MOST_IMAGES, help="Samples for each.", rich_help_panel=MEASURE)
]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_SEED, help="Image i depends on the seed and on i.", rich_help_panel=MEASURE)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=MACHINE)]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16.", rich_help_panel=MACHINE)]
BatchSize = Annotated[
    str, typer.Option(metavar="N|auto", help="Images per step; auto: by data and memory.", rich_help_panel="Model")
]
Gpus = Annotated[
    int, typer.Option(metavar="N", min=1, help="Share the work among N GPUs of this machine.", rich_help_panel=MACHINE)
]
AsJson = Annotated[bool, typer.Option("--json", callback=reserve, help="Print as JSON.")]
