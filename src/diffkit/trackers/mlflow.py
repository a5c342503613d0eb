"""MLflow, through its skinny client."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.interfaces import TrackedRun
from diffkit.trackers.library import required

if TYPE_CHECKING:
    from diffkit.interfaces import Log

TAG = "diffkit.run"
LONGEST_VALUE = 500


@contextmanager
def mlflow(run: TrackedRun, *, uri: str = "", experiment: str = "diffkit") -> Iterator[Log]:
    """MLflow: the server at `uri`, by default at MLFLOW_TRACKING_URI, or files in RUN/mlruns if that is not set."""
    with required("mlflow"):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = (run.path / "mlruns").resolve().as_uri()
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    place = client.create_experiment(experiment) if found is None else found.experiment_id
    same = client.search_runs([place], f"tags.`{TAG}` = '{run.id}'", max_results=1)
    number = (same[0] if same else client.create_run(place, tags={TAG: run.id}, run_name=run.name)).info.run_id
    if not same:
        settings = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in _flat(run.settings)]
        client.log_batch(number, params=settings)

    def log(images_seen: int, figures: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(number, metrics=[Metric(name, value, now, images_seen) for name, value in figures.items()])
        for name, path in pictures.items():
            client.log_artifact(number, str(path), name)

    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    finally:
        client.set_terminated(number, status)


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
