"""Model directories that somebody has made to do harm are refused in one line, without a wait."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time

import pytest

from tests.hf import models
from tests.reliability.checkpoints import body_of, sign
from tests.reliability.crafted import header_of
from vp_train.config import ConfigError
from vp_train.hf.convert import export_checkpoint, import_checkpoint

MOST_SECONDS, MOST_BYTES = 10, 2 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a directory of transformers with a tokenizer, and its import."""
    root = tmp_path_factory.mktemp("model")
    models.make("llama").save_pretrained(root / "theirs")
    (root / "theirs" / "tokenizer.json").write_text("{}")
    import_checkpoint(root / "theirs", root / "ours")
    return root


def setting(**values):
    """Change values of config.json."""

    def change(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))

    return change


def text(name, content):
    def change(path):
        (path / name).unlink(missing_ok=True)
        (path / name).write_bytes(content)

    return change


def pipe(name):
    def change(path):
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return change


def link(name, target):
    def change(path):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)

    return change


def sparse(name, num_bytes):
    def change(path):
        with (path / name).open("wb") as file:
            file.truncate(num_bytes)

    return change


def index(names):
    """Replace the weights by an index with these file names."""

    def change(path):
        weights = {f"t{number}": name for number, name in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    return change


def nested(depth, opening="[", closing="]"):
    return b'{"rope_scaling": ' + (opening * depth + closing * depth).encode() + b"}"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
WEIGHTS = "model.safetensors"
IMPORTS = {
    "deep JSON": (text("config.json", nested(100_000)), "config.json"),
    "JSON as deep as it can be read": (
        text("config.json", nested(900, '{"rope_scaling":', "}").replace(b":}", b":1}")),
        "config.json",
    ),
    "config above 64 MiB": (sparse("config.json", (64 << 20) + 1), "at most 67,108,864 are read"),
    "no JSON": (text("config.json", b"\x00\xff"), "config.json"),
    "a list": (text("config.json", b"[1]"), "config.json"),
    "control characters": (setting(model_type="\x1b[2J"), "config.json"),
    "a long value": (setting(model_type="x" * 1_000_000), "config.json"),
    "many layers": (setting(num_hidden_layers=10_000_000), "num_hidden_layers=10000000"),
    "more layers than tensors": (setting(num_hidden_layers=900), "900 layers"),
    "a wide model": (setting(hidden_size=1 << 50, head_dim=2), WEIGHTS.partition(".")[0]),
    "a number of many digits": (
        text("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"),
        "config.json",
    ),
    "config is a pipe": (pipe("config.json"), "config.json"),
    "config is a device": (link("config.json", "/dev/zero"), "config.json"),
    "config elsewhere": (link("config.json", "/etc/hostname"), "config.json"),
    "tokenizer elsewhere": (link("tokenizer.json", "/etc/passwd"), "tokenizer.json"),
    "tokenizer leads nowhere": (link("tokenizer.json", "nowhere"), "tokenizer.json"),
    "tokenizer leads to itself": (link("tokenizer.json", "tokenizer.json"), "tokenizer.json"),
    "tokenizer is a pipe": (pipe("tokenizer.json"), "tokenizer.json"),
    "tokenizer of 1 TB": (sparse("tokenizer.json", 1 << 40), "tokenizer.json"),
    "words above 256 MiB": (sparse("vocab.json", (256 << 20) + 1), "at most 268,435,456 are read"),
    "weights are a pipe": (pipe(WEIGHTS), WEIGHTS),
    "weights are a device": (link(WEIGHTS, "/dev/zero"), WEIGHTS),
    "weights elsewhere": (link(WEIGHTS, "/etc/passwd"), WEIGHTS),
    "weights are a pointer": (text(WEIGHTS, LFS), "git lfs pull"),
    "config is a pointer": (text("config.json", LFS), "git lfs pull"),
    "tokenizer is a pointer": (text("tokenizer.json", LFS), "git lfs pull"),
    "empty weights": (text(WEIGHTS, b""), WEIGHTS),
    "weights of 1 TB": (sparse(WEIGHTS, 1 << 40), WEIGHTS),
    "a long header": (text(WEIGHTS, (1 << 62).to_bytes(8, "little") + b"{}"), WEIGHTS),
    "a deep header": (text(WEIGHTS, header_of(b"[" * 200_000)), WEIGHTS),
    "offsets beyond": (
        text(
            WEIGHTS,
            header_of({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        ),
        WEIGHTS,
    ),
    "a shape that overflows": (
        text(
            WEIGHTS,
            header_of({"x": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 0]}}),
        ),
        WEIGHTS,
    ),
    "a pickle": (text(WEIGHTS, b"cos\nsystem\n(S'true'\ntR."), WEIGHTS),
    "index elsewhere": (index(["/etc/passwd"]), "index.json"),
    "index above": (index(["../theirs/model.safetensors"]), "index.json"),
    "index of nothing": (index([None]), "index.json"),
    "index of a missing file": (index(["a\x1b[2J.safetensors"]), "index.json"),
    "deep index": (text("model.safetensors.index.json", nested(100_000)), "index.json"),
}


def outcome(convert, source, target):
    """Return the message of the refusal, after checks of time, memory and what is left."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        convert(source, target)
    assert time.monotonic() - started < MOST_SECONDS
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_BYTES
    assert not target.exists()
    assert not list(target.parent.glob(".writing*"))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2000
    return message


@pytest.mark.parametrize("name", IMPORTS)
def test_a_crafted_model_is_refused_in_one_line(model, tmp_path, name):
    change, words = IMPORTS[name]
    shutil.copytree(model / "theirs", tmp_path / "theirs")
    change(tmp_path / "theirs")
    assert words in outcome(import_checkpoint, tmp_path / "theirs", tmp_path / "ours")


def test_links_within_the_cache_of_hugging_face_are_followed(model, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0a1b", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(model / "theirs", blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    imported = import_checkpoint(snapshot, tmp_path / "ours")
    assert imported.num_parameters > 0
    assert not (tmp_path / "ours" / "tokenizer.json").is_symlink()
    (tmp_path / "models--x/snapshots").rename(tmp_path / "models--x/others")
    elsewhere = tmp_path / "models--x/others/0a1b"
    assert "which is outside of" in outcome(import_checkpoint, elsewhere, tmp_path / "again")


def saved(*keys, to):
    """Change a value in the manifest of an import."""

    def change(body):
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = to

    return change


def half_of_a_tensor(body):
    """Say that the file holds only the first rows of a tensor, as it then does."""
    tensor = body["files"]["rank-00000.safetensors"]["tensors"]["parameter:embedding.weight"]
    tensor |= {"shape": [2 * tensor["shape"][0], tensor["shape"][1]], "dim": 0}
    tensor["ranges"] = [[0, tensor["shape"][0] // 2]]
    body["state"]["config"]["model"]["vocab_size"] *= 2


EXPORTS = {
    "no settings": (saved("state", to={}), "settings"),
    "settings of a list": (saved("state", "config", to=[1]), "settings"),
    "no model": (saved("state", "config", to={}), "model"),
    "another setting": (saved("state", "config", "model", "x\x1b", to=1), "another version"),
    "layers of text": (saved("state", "config", "model", "num_layers", to="8"), "num_layers"),
    "a number for a flag": (
        saved("state", "config", "model", "tied_embeddings", to=1),
        "model.tied_embeddings=1, which is of another type",
    ),
    "text for a number": (
        saved("state", "config", "model", "rope_base", to="8"),
        "model.rope_base=",
    ),
    "half a layer": (saved("state", "config", "model", "num_layers", to=2.5), "num_layers"),
    "many layers": (saved("state", "config", "model", "num_layers", to=10_000_000), "layers"),
    "a wide model": (
        saved("state", "config", "model", "ffn_hidden_size", to=1 << 20),
        "linear_fc1",
    ),
    "a model beyond bounds": (
        saved("state", "config", "model", "ffn_hidden_size", to=1 << 50),
        "step-00000000: model.ffn_hidden_size=",
    ),
    "a norm that is not there": (
        saved("state", "config", "model", "qk_norm", to=True),
        "has no layers.0.layer.self_attention.q_layernorm.weight, which its model asks for",
    ),
    "half of a tensor": (half_of_a_tensor, "does not hold all of embedding.weight"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_a_crafted_checkpoint_is_not_exported(model, tmp_path, name):
    change, words = EXPORTS[name]
    shutil.copytree(model / "ours", tmp_path / "ours")
    checkpoint = tmp_path / "ours" / "step-00000000"
    body = body_of(checkpoint)
    change(body)
    sign(checkpoint, body)
    assert words in outcome(export_checkpoint, tmp_path / "ours", tmp_path / "back")


def test_a_run_whose_tokenizer_cannot_be_read_is_not_exported(model, tmp_path):
    shutil.copytree(model / "ours", tmp_path / "ours")
    sparse("tokenizer.json", 1 << 40)(tmp_path / "ours")
    message = outcome(export_checkpoint, tmp_path / "ours", tmp_path / "back")
    assert "tokenizer.json has 1,099,511,627,776 bytes" in message


def test_a_reach_that_is_no_number_is_not_exported(model, tmp_path):
    shutil.copytree(model / "ours", tmp_path / "ours")
    setting(max_position_embeddings="8")(tmp_path / "ours")
    message = outcome(export_checkpoint, tmp_path / "ours", tmp_path / "back")
    assert 'max_position_embeddings="8" must be a whole number' in message
