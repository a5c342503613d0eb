"""Real Hugging Face layouts, written by the tests with `datasets` and pyarrow, become diffkit examples."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import diffkit_huggingface
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from diffkit_huggingface import tables
from diffkit_huggingface.source import huggingface
from PIL import Image

from diffkit.errors import DiffkitError
from diffkit.interfaces import Example
from diffkit.testing import check_dataset

# The datasets library leaves metadata files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """Those files are closed while their warnings are ignored, not at the end of all tests, where they are errors."""
    yield
    gc.collect()


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (6, 5), (value, 255 - value, 9))


def encoded(value: int) -> bytes:
    file = io.BytesIO()
    picture(value).save(file, "png")
    return file.getvalue()


def put(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(value).save(path)
    return path


def opened(example: Example) -> Image.Image:
    image = Image.open(example.image) if isinstance(example.image, Path) else example.image
    image = image() if callable(image) and not isinstance(image, Image.Image) else image
    assert isinstance(image, Image.Image)
    return image.convert("RGB")


def labels(found: Iterator[Example]) -> list[str | None]:
    return [example.label for example in found]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is read from or left in the user's own cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def saved_table(classes: bool = True) -> datasets.Dataset:
    kind = datasets.ClassLabel(names=["cat", "dog"]) if classes else datasets.Value("string")
    features = datasets.Features({"img": datasets.Image(), "kind": kind})
    kinds = [0, 1, 1] if classes else ["cat", "dog", "dog"]
    return datasets.Dataset.from_dict({"img": [encoded(n) for n in range(3)], "kind": kinds}, features=features)


# Image folders.


def test_an_image_folder_gives_paths_and_folder_names(root: Path) -> None:
    for name in ("cat", "dog"):
        put(root / "train" / name / "0.png", 1)
    found = list(huggingface(str(root)))
    assert [(example.id, example.label) for example in found] == [
        ("train/cat/0.png", "cat"),
        ("train/dog/0.png", "dog"),
    ]
    assert all(isinstance(example.image, Path) for example in found)
    check_dataset(huggingface, root)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("column", ["label", "species"])
def test_a_metadata_file_names_the_classes(root: Path, kind: str, column: str) -> None:
    rows = [{"file_name": f"{n}.png", column: ["fern", "moss"][n % 2], "text": f"photo {n}"} for n in range(4)]
    for n in range(4):
        put(root / f"{n}.png", n)
    lines = [json.dumps(row) for row in rows]
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (root / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    assert labels(huggingface(str(root))) == ["fern", "moss", "fern", "moss"]
    assert labels(huggingface(str(root), label_column="text")) == [f"photo {n}" for n in range(4)]
    assert labels(huggingface(str(root), label_column="none")) == [None] * 4
    check_dataset(huggingface, root)


def test_class_folders_still_count_beside_a_metadata_file(root: Path) -> None:
    for name in ("cat", "dog"):
        put(root / "train" / name / "0.png", 1)
    (root / "train" / "metadata.csv").write_text("file_name,text\ncat/0.png,a cat\ndog/0.png,a dog\n")
    assert labels(huggingface(str(root))) == ["cat", "dog"]
    assert labels(huggingface(str(root), label_column="none")) == [None, None]


def test_captions_alone_are_not_classes(root: Path) -> None:
    put(root / "a.png", 1)
    (root / "metadata.csv").write_text("file_name,caption\na.png,a red square\n")
    assert labels(huggingface(str(root))) == [None]


def test_whole_number_labels_become_text_and_empty_ones_none(root: Path) -> None:
    for n in range(3):
        put(root / f"{n}.png", n)
    (root / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{n}.png", "label": n if n else None}) + "\n" for n in range(3))
    )
    assert labels(huggingface(str(root))) == [None, "1", "2"]


def test_a_damaged_image_costs_only_itself(root: Path) -> None:
    put(root / "a.png", 1)
    (root / "b.png").write_bytes(b"not an image")
    put(root / "c.png", 3)
    found = list(huggingface(str(root)))
    assert [example.id for example in found] == ["a.png", "b.png", "c.png"]
    opened(found[2])


def test_an_image_listed_twice_has_two_ids(root: Path) -> None:
    put(root / "a.png", 1)
    (root / "metadata.csv").write_text("file_name,label\na.png,x\na.png,y\n")
    assert [(e.id, e.label) for e in huggingface(str(root))] == [("a.png", "x"), ("a.png#1", "y")]


@pytest.mark.parametrize("other", ["test", "validation"])
def test_folders_of_splits_alone_are_no_classes(root: Path, other: str) -> None:
    for n in range(3):
        put(root / "train" / f"{n}.png", n)
        put(root / other / f"{n}.png", 9 + n)
    found = list(huggingface(str(root)))
    assert [(each.id, each.label) for each in found] == [(f"train/{n}.png", None) for n in range(3)]
    assert labels(huggingface(str(root), split=other)) == [None] * 3
    assert [opened(each).getpixel((0, 0)) for each in found] == [(n, 255 - n, 9) for n in range(3)]
    with pytest.raises(DiffkitError, match=r"Column 'label' holds .*, not classes"):
        huggingface(str(root), label_column="label")


def test_images_beside_the_class_folders_have_no_class(root: Path) -> None:
    for name in ("cat/0.png", "dog/0.png", "1.png"):
        put(root / "train" / name, 1)
    assert {each.id: each.label for each in huggingface(str(root))} == {
        "train/cat/0.png": "cat",
        "train/dog/0.png": "dog",
        "train/1.png": None,
    }


# Tables.


@pytest.mark.parametrize("classes", [True, False])
def test_parquet_with_an_image_column_keeps_class_names(root: Path, classes: bool) -> None:
    root.mkdir()
    saved_table(classes).to_parquet(str(root / "train.parquet"))
    for path in (root, root / "train.parquet"):
        found = list(huggingface(str(path)))
        assert [example.label for example in found] == ["cat", "dog", "dog"]
        assert [opened(example).getpixel((0, 0)) for example in found] == [(n, 255 - n, 9) for n in range(3)]
        check_dataset(huggingface, path)


@pytest.mark.parametrize("bare", [True, False])
def test_parquet_from_another_program(root: Path, bare: bool) -> None:
    """Without the library's own metadata: a struct of bytes and path, or bytes alone."""
    root.mkdir()
    images: list[Any] = [encoded(n) if bare else {"bytes": encoded(n), "path": None} for n in range(4)]
    pq.write_table(pa.table({"picture": images, "label": [0, 1, 0, 1]}), root / "part-0.parquet")
    found = list(huggingface(str(root)))
    assert [(e.id, e.label) for e in found] == [(f"train/{n}", str(n % 2)) for n in range(4)]
    assert opened(found[3]).getpixel((0, 0)) == (3, 252, 9)


def test_parquet_may_hold_paths_and_missing_or_damaged_images(root: Path) -> None:
    file = put(root / "images" / "a.png", 7)
    images = [{"bytes": None, "path": str(file)}, {"bytes": b"broken", "path": None}, None]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(images, struct)}), root / "rows.parquet")
    good, broken, missing = huggingface(str(root / "rows.parquet"))
    assert good.image == file
    with pytest.raises(OSError, match="cannot identify"):
        opened(broken)
    with pytest.raises(ValueError, match="holds no image"):
        opened(missing)


def test_an_undecoded_image_can_be_sent_to_a_worker(root: Path) -> None:
    root.mkdir()
    saved_table().to_parquet(str(root / "train.parquet"))
    example = pickle.loads(pickle.dumps(next(huggingface(str(root)))))
    assert opened(example).size == (6, 5)


def test_what_save_to_disk_wrote(root: Path) -> None:
    saved_table().save_to_disk(str(root / "one"))
    datasets.DatasetDict(train=saved_table(), test=saved_table()).save_to_disk(str(root / "two"))
    assert labels(huggingface(str(root / "one"))) == ["cat", "dog", "dog"]
    assert labels(huggingface(str(root / "two"), split="test")) == ["cat", "dog", "dog"]
    check_dataset(huggingface, root / "one")


def test_a_damaged_table_says_so(root: Path) -> None:
    root.mkdir()
    (root / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DiffkitError, match=r"cannot be read|breaks off after 0 rows"):
        list(huggingface(str(root)))


# What users get wrong.


def test_a_missing_path_is_named() -> None:
    with pytest.raises(DiffkitError, match=r"no file or folder /no/such/place.*written owner/name"):
        huggingface("/no/such/place")


def test_an_empty_folder_is_no_data_set(root: Path) -> None:
    root.mkdir()
    with pytest.raises(DiffkitError, match=r"cannot be read as a Hugging Face data set.*--source folder"):
        huggingface(str(root))


def test_another_kind_of_file_is_refused(root: Path) -> None:
    with pytest.raises(DiffkitError, match="no parquet or arrow file"):
        huggingface(str(put(root / "a.png", 1)))


def test_an_unknown_split_lists_the_splits(root: Path) -> None:
    for split in ("train", "test"):
        put(root / split / "a.png", 1)
    with pytest.raises(DiffkitError, match=r"no split 'tests'\. Did you mean 'test'\?.*train, test"):
        huggingface(str(root), split="tests")
    assert [example.id for example in huggingface(str(root), split="test")] == ["test/a.png"]


def test_no_image_column_lists_the_columns(root: Path) -> None:
    root.mkdir()
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), root / "t.parquet")
    with pytest.raises(DiffkitError, match="No column holds images; the columns are a, b"):
        huggingface(str(root))
    with pytest.raises(DiffkitError, match="Column 'b' holds no images"):
        huggingface(str(root), image_column="b")


def test_two_image_columns_need_a_choice(root: Path) -> None:
    root.mkdir()
    rows = [{"bytes": encoded(1), "path": None}]
    pq.write_table(pa.table({"before": rows, "after": rows}), root / "t.parquet")
    with pytest.raises(DiffkitError, match=r"More than one.*image_column=NAME, where NAME is before or after"):
        huggingface(str(root))
    assert len(list(huggingface(str(root), image_column="after"))) == 1


def test_an_unknown_label_column_gets_the_nearest_name(root: Path) -> None:
    root.mkdir()
    saved_table().to_parquet(str(root / "train.parquet"))
    with pytest.raises(DiffkitError, match=r"No column 'kinds'\. Did you mean 'kind'\? The columns are img, kind"):
        huggingface(str(root), label_column="kinds")


def test_a_column_of_lists_is_no_label(root: Path) -> None:
    root.mkdir()
    pq.write_table(pa.table({"image": [encoded(1)], "boxes": [[1.0, 2.0]]}), root / "t.parquet")
    with pytest.raises(DiffkitError, match=r"Column 'boxes' holds .* not classes"):
        huggingface(str(root), label_column="boxes")


# The hub.


class NotFound(BaseHTTPRequestHandler):
    """Answers like the hub does for a name that it does not know."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def endpoint(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_a_name_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint(monkeypatch, server.server_port)
        with pytest.raises(DiffkitError, match=r"no data set of that name on the hub.*hf auth login"):
            huggingface("nobody/nothing")
        server.shutdown()


def test_a_silent_hub_is_given_up_on_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint(monkeypatch, silent.getsockname()[1])
        monkeypatch.setattr(tables, "TIMEOUT", 0.3)
        start = time.monotonic()
        with pytest.raises(DiffkitError, match=r"hub cannot be reached \(.*Timeout.*hf download some/thing"):
            huggingface("some/thing")
        assert time.monotonic() - start < 5


def test_offline_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DiffkitError, match=r"no folder some/thing here.*no earlier download.*--local-dir FOLDER"):
        huggingface("some/thing")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_without_the_hub_an_earlier_download_is_used(
    root: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.mkdir()
    saved_table().to_parquet(str(root / "train.parquet"))
    datasets.load_dataset("parquet", data_files=str(root / "train.parquet"))
    earlier = next((own_cache / "parquet").glob("*/*/*/"))
    later = own_cache / "some___thing" / "default" / earlier.parent.name / earlier.name
    later.parent.mkdir(parents=True)
    earlier.rename(later)
    for file in later.glob("parquet-*"):
        file.rename(later / file.name.replace("parquet-", "thing-", 1))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert labels(huggingface("some/thing")) == ["cat", "dog", "dog"]
    with pytest.raises(DiffkitError, match="no split 'test'"):
        huggingface("some/thing", split="test")


def test_with_the_hub_the_split_is_checked_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        calls.append(options)
        tables = datasets.DatasetDict(train=saved_table())
        return tables[options["split"]] if "split" in options else tables

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(tables, "_unreachable", lambda *_: "")
    with pytest.raises(DiffkitError, match="no split 'trian'"):
        huggingface("some/thing", split="trian")
    assert [call.get("split") for call in calls] == [None]
    assert labels(huggingface("some/thing")) == ["cat", "dog", "dog"]
    assert calls[-1] == {"revision": None, "split": "train"}
    assert labels(huggingface("some/thing", streaming=True, revision="v1")) == ["cat", "dog", "dog"]
    assert calls[-1] == {"revision": "v1", "streaming": True}


def test_the_hook_names_it_without_importing_anything_heavy() -> None:
    program = "import sys, diffkit_huggingface; sys.exit(bool({'datasets', 'PIL', 'torch'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
    assert diffkit_huggingface.datasets() == {"huggingface": "diffkit_huggingface.source:huggingface"}
