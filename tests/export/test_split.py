"""Halves of a bundle: what they hold, that a pair of processes runs on them, and who refuses them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from deepstitch.cli import cli
from deepstitch.errors import BundleError, OutputError
from deepstitch.export.split import SIDES, split_bundle
from deepstitch.manifest import Manifest, file_sha256
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
from deepstitch.runtime.pipeline import Pipeline
from deepstitch.tensorfile import TensorFile

from ..runtime.disaggregated.pair import ask, conversation, encode_config, language_config, png, running, same
from .conftest import Exported

WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "portable": ({}, {"target": "portable"}),
    "by reference": ({"dtype": "BF16", "shards": 3}, {"target": "ort-cpu", "by_reference": True}),
    "int4": ({}, {"target": "ort-cpu", "weights": "int4"}),
}


@pytest.fixture(scope="module", params=WHOLE)
def whole(
    request: pytest.FixtureRequest, checkpoints: Callable[..., Checkpoint], export: Callable[..., Exported]
) -> Path:
    source, options = WHOLE[request.param]
    return export(checkpoints(**source), **options).bundle


@pytest.fixture(scope="module")
def halves(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("halves")
    bundle = Bundle.open(whole)
    return {side: split_bundle(bundle, side, folder / side, progress=False) for side in SIDES}


def tensors(bundle: Path) -> dict[str, set[bytes]]:
    """Every stored tensor, with dtype and shape; by reference, several may have one name."""
    files = [TensorFile.open(bundle / name) for name in Manifest.read(bundle).files if name.endswith(".safetensors")]
    entries = [entry for file in files for entry in file.values()]
    found: dict[str, set[bytes]] = defaultdict(set)
    for each in entries:
        found[each.name].add(f"{each.dtype} {each.shape} ".encode() + each.read().tobytes())
    return found


def test_each_half_has_its_own_weights(whole: Path, halves: dict[str, Path]) -> None:
    all_of_it, encode, language = tensors(whole), tensors(halves["encode"]), tensors(halves["language"])
    for name, copies in all_of_it.items():
        assert (encode.get(name, set()) | language.get(name, set())) <= copies
    unread = all_of_it.keys() - encode.keys() - language.keys()
    assert all(name.endswith(".zero_points") for name in unread), "symmetric weights have some that no graph reads"
    table = Manifest.read(whole).embedding.tensor
    assert {name.removesuffix(".scales").removesuffix(".zero_points") for name in encode if ".visual." not in name} == {
        table
    }
    assert not any(".visual." in name for name in language)
    for side, path in halves.items():
        manifest = Manifest.read(path)
        assert list(manifest.graphs) == [SIDES[side]]
        files = {each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file()}
        assert files == {*manifest.files, "manifest.json"}
        assert all(file_sha256(path / name) == record.sha256 for name, record in manifest.files.items())
        assert (path / str(manifest.checkpoint)).resolve() == (whole / str(Manifest.read(whole).checkpoint)).resolve()


def test_a_pair_runs_on_halves(whole: Path, halves: dict[str, Path]) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    file = png(pixels)

    async def run() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            async with contextlib.AsyncExitStack() as stack:
                server = EncodeServer(encode_config(halves["encode"], "shm", folder))
                encode = await stack.enter_async_context(running(server))
                language = LanguageServer(language_config(halves["language"], encode.address))
                await stack.enter_async_context(running(language))
                return await ask(language, "what is it?", [file])

    options = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3}
    alone = Pipeline.open(whole, threads=1).generate(
        conversation("what is it?", 1), images=[Image.fromarray(pixels)], **options
    )
    assert same(asyncio.run(run()), alone)


@pytest.fixture
def one(checkpoints: Callable[..., Checkpoint], export: Callable[..., Exported]) -> Path:
    source, options = WHOLE["portable"]
    return export(checkpoints(**source), **options).bundle


def invoke(*words: str | Path) -> tuple[int, str]:
    finished = CliRunner().invoke(cli, [str(word) for word in words])
    return finished.exit_code, finished.output


def test_halves_are_refused_where_all_is_needed(one: Path, tmp_path: Path) -> None:
    code, text = invoke(
        "split", one, "--encode-side", tmp_path / "e", "--language-side", tmp_path / "l", "--json", "--quiet"
    )
    assert code == 0 and json.loads(text)["encode"]["bytes"] == sum(
        record.size for record in Manifest.read(tmp_path / "e").files.values()
    )
    for side, other, server in (("e", "decoder", "encode-server"), ("l", "vision_encoder", "language-server")):
        for words in (("run", tmp_path / side, "--prompt", "hello"), ("compare", tmp_path / side)):
            code, text = invoke(*words)
            assert code == 2 and f"has no graph '{other}': it is one side" in text and server in text, text
        code, text = invoke("run", tmp_path / side, "--prompt", "hello", "--disaggregated")
        assert code == 2 and f"has no graph '{other}'" in text, text
    code, text = invoke("split", tmp_path / "l", "--encode-side", tmp_path / "again")
    assert code == 2 and "one side of a split bundle" in text and not (tmp_path / "again").exists()
    code, text = invoke("inspect", tmp_path / "l")
    assert code == 0 and "decoder" in text, text


def test_servers_refuse_the_other_side(one: Path, tmp_path: Path) -> None:
    halves = {side: split_bundle(Bundle.open(one), side, tmp_path / side, progress=False) for side in SIDES}
    with pytest.raises(BundleError, match="has no graph 'vision_encoder': it is one side"):
        asyncio.run(EncodeServer(encode_config(halves["language"], "tcp", "")).start())
    with pytest.raises(BundleError, match="has no graph 'decoder': it is one side"):
        asyncio.run(LanguageServer(language_config(halves["encode"])).start())
    with pytest.raises(BundleError, match="has no graph 'vision_encoder': it is one side"):
        asyncio.run(LanguageServer(language_config(halves["language"], local_encoder=True)).start())


def test_nothing_is_written_where_it_must_not_be(
    one: Path, tmp_path: Path, checkpoints: Callable[..., Checkpoint], export: Callable[..., Exported]
) -> None:
    def refused(text: str, *words: str | Path) -> None:
        code, output = invoke("split", *words, "--quiet")
        assert code == 2 and text in output, output

    refused("nothing to write", one)
    refused("both halves", one, "--encode-side", tmp_path / "x", "--language-side", tmp_path / "x")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("do not lose me", "utf-8")
    refused("exists already", one, "--encode-side", tmp_path / "x", "--language-side", precious)
    refused("is not a bundle", one, "--encode-side", precious, "--overwrite")
    refused("is the bundle itself", one, "--encode-side", one, "--overwrite")
    text = export(checkpoints(family="qwen3_moe", dtype="F16", norm_topk_prob=False), target="ort-cpu").bundle
    refused("reads text only", text, "--language-side", tmp_path / "x")
    assert not (tmp_path / "x").exists() and list(precious.iterdir()) == [precious / "file"]
    with pytest.raises(OutputError, match="exists already"):
        split_bundle(Bundle.open(one), "encode", precious)
