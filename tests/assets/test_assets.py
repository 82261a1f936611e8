import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from places import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hovle import assets, cli
from hovle.assets import cache as cache_room
from hovle.assets import gguf as gguf_room
from hovle.assets import manifest as manifest_room
from hovle.assets import registry, wheel

WEIGHTS = bytes(range(256)) * 40


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheels(tmp_path):
    """A folder as an offline user fills it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    return folder


def make_wheel(folder, extra=(), weights=WEIGHTS):
    """Write a small wheel in the layout of the real ones; `extra` holds (ZipInfo or name, content) pairs."""
    path = folder / "hovle_toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("hovle_toy/__init__.py", "raise SystemExit('code of a data package ran')")
        archive.writestr("hovle_toy/weights.bin", weights)
        for index in range(3):
            archive.writestr(f"hovle_toy/data/images/{index}.png", f"picture {index}")
        archive.writestr("hovle_toy/data/images/deeper/3.png", "not named by the pattern")
        archive.writestr("hovle_toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: hovle-toy\nVersion: 1.0\n")
        archive.writestr(
            "hovle_toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("hovle_toy-1.0.dist-info/RECORD", "")
        for entry, content in extra:
            archive.writestr(entry, content)
    return path


def make_manifest(wheel, path, **changes):
    """Write a manifest for `make_wheel`'s wheel; returns the asset it describes."""
    content = wheel.read_bytes()
    archive = {
        "registry": "pypi",
        "package": "hovle-toy",
        "version": "1.0",
        "filename": wheel.name,
        "sha256": sha256(content),
        "size": len(content),
        "members": [
            {
                "pattern": "hovle_toy/weights.bin",
                "to": "weights.bin",
                "count": 1,
                "size": len(WEIGHTS),
                "sha256": sha256(WEIGHTS),
            },
            {"pattern": "hovle_toy/data/images/*.png", "to": "images/", "count": 3, "size": 27},
        ],
    }
    hub = {
        "repo_id": "somebody/toy",
        "revision": "main",
        "note": "",
        "files": ["config.json", "model.safetensors", "merges.txt"],
        "required": ["config.json", "model.safetensors"],
    }
    entry = {"name": "toy", "kind": "teacher", "groups": ["demo"], "description": "", "licence": "MIT"}
    entry |= {"attribution": "", "homepage": "https://example.org", "archive": {**archive, **changes}, "hub": hub}
    manifest = {"format": 2, "assets": [entry], "families": []}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return assets.load_manifest(path)["toy"]


@pytest.fixture
def toy(wheels, tmp_path):
    return make_manifest(make_wheel(wheels), tmp_path / "manifest.json")


def unpacked(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


GOOD = [".complete.json", "images/0.png", "images/1.png", "images/2.png", "weights.bin"]


def leftovers(cache):
    return [*cache.glob(".*"), *cache.glob("downloads/*")]


# Unpacking a wheel


def test_only_the_files_of_the_manifest_are_unpacked(toy, wheels, cache):
    folder = assets.fetch_asset(toy, downloads=wheels)
    assert folder.parent == cache
    assert unpacked(folder) == GOOD
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    assert (folder / "images/1.png").read_text() == "picture 1"
    assert leftovers(cache) == []
    assert (wheels / toy.archive.filename).exists()


def test_a_complete_folder_is_taken_without_the_wheel_and_without_the_lock(toy, wheels, monkeypatch, cache):
    first = assets.fetch_asset(toy, downloads=wheels)
    (wheels / toy.archive.filename).unlink()
    monkeypatch.setattr(cache_room, "_locked", None)
    assert assets.fetch_asset(toy, downloads=wheels) == first


def test_the_folder_of_wheels_may_come_from_the_environment(toy, wheels, monkeypatch, cache):
    monkeypatch.setenv("HOVLE_DOWNLOADS", str(wheels))
    assert unpacked(assets.fetch_asset(toy)) == GOOD


def test_a_wrong_hash_is_refused_before_unpacking(wheels, tmp_path, monkeypatch, cache):
    toy = make_manifest(make_wheel(wheels), tmp_path / "manifest.json")
    tampered = make_wheel(wheels, weights=WEIGHTS[::-1]).read_bytes()
    monkeypatch.setattr(registry, "_unpack", None)
    with pytest.raises(ValueError, match="nothing was unpacked") as error:
        assets.fetch_asset(toy, downloads=wheels)
    assert toy.archive.sha256 in str(error.value)
    assert sha256(tampered) in str(error.value)
    assert (wheels / toy.archive.filename).read_bytes() == tampered, "the user's file was touched"
    assert leftovers(cache) == []


def link(name, target):
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry, target


def special(name):
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3
    entry.external_attr = (stat.S_IFIFO | 0o644) << 16
    return entry, b""


@pytest.mark.parametrize(
    "extra",
    [
        ("../evil.txt", b"x"),
        ("hovle_toy/data/images/../../../../evil.png", b"x"),
        ("/tmp/evil.txt", b"x"),
        ("hovle_toy\\..\\evil.txt", b"x"),
        ("C:evil.txt", b"x"),
        ("hovle_toy//evil.txt", b"x"),
        ("./evil.txt", b"x"),
        link("hovle_toy/data/images/3.png", "/etc/passwd"),
        special("hovle_toy/pipe"),
    ],
    ids=["dotdot", "dotdot-inside", "absolute", "backslash", "drive", "empty", "dot", "symlink", "fifo"],
)
def test_a_wheel_with_an_unsafe_member_is_refused_as_a_whole(extra, wheels, tmp_path, cache):
    toy = make_manifest(make_wheel(wheels, [extra]), tmp_path / "manifest.json")
    with pytest.raises(ValueError, match=r"unsafe name|link or special"):
        assets.fetch_asset(toy, downloads=wheels)
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(cache.glob("toy*"))
    assert leftovers(cache) == []


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_wheel_with_two_files_of_one_name_is_refused(wheels, tmp_path, cache):
    toy = make_manifest(make_wheel(wheels, [("hovle_toy/weights.bin", b"x")]), tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="two files of the same name"):
        assets.fetch_asset(toy, downloads=wheels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 2}, "holds 1 files"),
        ({"size": 5}, r"10,240 bytes\) of hovle_toy/weights.bin; the manifest says 1 \(5 bytes"),
        ({"sha256": "0" * 64}, "the manifest says 0000"),
    ],
)
def test_members_that_differ_from_the_manifest_are_refused(change, message, wheels, tmp_path, cache):
    member = {"pattern": "hovle_toy/weights.bin", "to": "weights.bin", "count": 1, "size": len(WEIGHTS), **change}
    toy = make_manifest(make_wheel(wheels), tmp_path / "manifest.json", members=[member])
    with pytest.raises(ValueError, match=message):
        assets.fetch_asset(toy, downloads=wheels)
    assert not list(cache.glob("toy*"))


# Interruptions, repairs, several processes


def test_an_interrupted_unpacking_leaves_nothing_and_the_next_run_completes_it(toy, wheels, monkeypatch, cache):
    whole = registry._copy

    def interrupted(entry, member, *rest):
        whole(entry, member, *rest)
        if member.to == "weights.bin":
            raise KeyboardInterrupt

    monkeypatch.setattr(registry, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch_asset(toy, downloads=wheels)
    assert not list(cache.glob("toy*"))
    assert leftovers(cache) == []
    monkeypatch.setattr(registry, "_copy", whole)
    assert unpacked(assets.fetch_asset(toy, downloads=wheels)) == GOOD


@pytest.mark.parametrize("damage", ["truncated", "missing file", "missing marker", "broken marker", "other source"])
def test_a_damaged_folder_is_noticed_and_made_anew(damage, toy, wheels, cache):
    folder = assets.fetch_asset(toy, downloads=wheels)
    before = (folder / ".complete.json").read_text()
    if damage == "truncated":
        os.truncate(folder / "weights.bin", 100)
    elif damage == "missing file":
        (folder / "images/2.png").unlink()
    elif damage == "missing marker":
        (folder / ".complete.json").unlink()
    elif damage == "broken marker":
        (folder / ".complete.json").write_text("[]")
    else:
        marker = json.loads((folder / ".complete.json").read_text())
        (folder / ".complete.json").write_text(json.dumps({**marker, "sha256": "0" * 64}))
    assert assets.fetch_asset(toy, downloads=wheels) == folder
    assert unpacked(folder) == GOOD
    assert (folder / ".complete.json").read_text() == before
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    assert leftovers(cache) == []


PROCESS = """
import importlib, pathlib, sys, time, types
# The folder as a bare package: importing hovle itself would cost each process seconds for torch.
sys.modules["hovle"] = types.ModuleType("hovle")
sys.modules["hovle"].__path__ = [{package!r}]
assets, registry = map(importlib.import_module, ["hovle.assets", "hovle.assets.registry"])
toy = assets.load_manifest(pathlib.Path({manifest!r}))["toy"]
unpack = registry._unpack
def slow_unpack(file, source, folder):
    (folder / "weights.bin").write_text("half")
    print("unpacking", flush=True)
    time.sleep({seconds})
    (folder / "weights.bin").unlink()
    unpack(file, source, folder)
registry._unpack = slow_unpack
print("ready", flush=True)
sys.stdin.readline()
print(assets.fetch_asset(toy, downloads=pathlib.Path({wheels!r})), flush=True)
"""


def start_process(tmp_path, wheels, seconds):
    script = PROCESS.format(
        package=str(ROOT / "hovle"), manifest=str(tmp_path / "manifest.json"), wheels=str(wheels), seconds=seconds
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def test_processes_that_fetch_at_once_share_one_unpacking(toy, wheels, tmp_path, cache):
    processes = [start_process(tmp_path, wheels, seconds=0.5) for _ in range(3)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    printed = [stdout.split() for stdout, _ in outputs]
    assert {lines[-1] for lines in printed} == {str(cache / "toy-1.0")}
    assert sum("unpacking" in lines for lines in printed) == 1
    assert unpacked(cache / "toy-1.0") == GOOD
    assert leftovers(cache) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_process_leaves_no_lock_and_no_complete_looking_folder(toy, wheels, tmp_path, cache):
    process = start_process(tmp_path, wheels, seconds=600)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "unpacking\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(leftovers(cache)) == 1
    assert not (cache / "toy-1.0").exists()
    assert unpacked(assets.fetch_asset(toy, downloads=wheels)) == GOOD
    assert leftovers(cache) == []


# pip


@pytest.fixture
def offline_pip(monkeypatch):
    """Set pip up as a user without a network would; returns how to give it a folder of wheels."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return lambda folder: monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_pip_brings_the_wheel_and_a_wrong_one_is_set_aside(toy, wheels, tmp_path, offline_pip, cache):
    offline_pip(wheels)
    good = (wheels / toy.archive.filename).read_bytes()
    make_wheel(wheels, weights=WEIGHTS[::-1])
    with pytest.raises(ValueError, match="the next run downloads it again"):
        assets.fetch_asset(toy)
    assert [path.name for path in leftovers(cache)] == [f"{toy.archive.filename}.rejected"]
    (wheels / toy.archive.filename).write_bytes(good)
    assert unpacked(assets.fetch_asset(toy)) == GOOD
    assert [path.name for path in leftovers(cache)] == [f"{toy.archive.filename}.rejected"]


def test_without_a_network_the_error_says_which_wheel_to_copy(toy, offline_pip, cache):
    with pytest.raises(ValueError, match=r"pip could not download hovle-toy 1.0 \(exit code 1\)") as error:
        assets.fetch_asset(toy)
    message = str(error.value)
    assert "No matching distribution" in message
    assert "python -m pip download --no-deps --only-binary=:all: hovle-toy==1.0" in message
    assert f"copy {toy.archive.filename} into a folder" in message
    assert "hovle fetch toy --from FOLDER" in message
    assert leftovers(cache) == []


def test_a_wheel_downloaded_whole_before_an_interruption_is_not_downloaded_again(toy, wheels, monkeypatch, cache):
    def copy(archive, folder):
        shutil.copy(wheels / archive.filename, folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheel, "download", copy)
        patch.setattr(registry, "_unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch_asset(toy)
    monkeypatch.setattr(wheel, "download", None)
    assert unpacked(assets.fetch_asset(toy)) == GOOD
    assert leftovers(cache) == []


def test_partial_downloads_are_thrown_away(toy, wheels, monkeypatch, cache):
    def copy(archive, folder):
        assert list(folder.iterdir()) == []
        shutil.copy(wheels / archive.filename, folder)

    partial = cache / "downloads" / "toy.incoming-killed"
    partial.mkdir(parents=True)
    (partial / toy.archive.filename).write_bytes(b"half")
    (cache / "downloads" / toy.archive.filename).write_bytes(b"half")
    monkeypatch.setattr(wheel, "download", copy)
    assert unpacked(assets.fetch_asset(toy)) == GOOD
    assert leftovers(cache) == []


def test_an_interpreter_without_pip_is_explained(toy, monkeypatch, cache):
    monkeypatch.setattr(wheel, "installed_version", lambda package: None)
    with pytest.raises(ValueError, match=r"(?s)has no pip .* ensurepip.*hovle fetch toy --from FOLDER"):
        assets.fetch_asset(toy)


def test_a_wheel_missing_from_the_given_folder_is_named(toy, tmp_path, cache):
    with pytest.raises(ValueError, match=r"elsewhere does not hold hovle_toy-1.0-py3-none-any.whl.*pip download"):
        assets.fetch_asset(toy, downloads=tmp_path / "elsewhere")


# The disk


def test_too_little_space_is_said_before_downloading(toy, monkeypatch, cache):
    monkeypatch.setattr(wheel, "download", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=3_000))
    with pytest.raises(ValueError, match=r"0\.0 MB free .* HOVLE_CACHE"):
        assets.fetch_asset(toy)


@pytest.mark.parametrize(("code", "advice"), [(errno.ENOSPC, "Free some space"), (errno.EROFS, "you may write to")])
def test_a_disk_that_refuses_is_explained_and_leaves_nothing_half_made(code, advice, toy, wheels, monkeypatch, cache):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(registry, "_copy", refuse)
    with pytest.raises(ValueError, match=advice):
        assets.fetch_asset(toy, downloads=wheels)
    assert leftovers(cache) == []


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "chosen"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("HOVLE_CACHE")
    assert assets.cache_folder() == tmp_path / "xdg" / "hovle"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    if sys.platform == "linux":
        assert assets.cache_folder() == tmp_path / ".cache" / "hovle"


# The Hub, by a stand-in: the real one is not reachable where these tests run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository with one commit; returns its files and the calls made."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(WEIGHTS)
    (snapshot / "pickle.bin").write_bytes(b"not asked for")
    calls = []

    class Api:
        def repo_info(self, repo_id, revision):
            calls.append((repo_id, revision))
            return types.SimpleNamespace(sha="c0ffee")

    def download(repo_id, revision, allow_patterns):
        calls.append((repo_id, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return snapshot, calls


def test_the_hub_gives_the_named_files_of_one_commit(toy, hub, cache):
    _, calls = hub
    folder = assets.fetch_asset(toy, source="hub")
    assert unpacked(folder) == [".complete.json", "config.json", "model.safetensors"]
    assert json.loads((folder / ".complete.json").read_text())["revision"] == "c0ffee"
    files = ["config.json", "model.safetensors", "merges.txt"]
    assert calls == [("somebody/toy", "main"), ("somebody/toy", "c0ffee", files)]
    assert assets.fetch_asset(toy, source="hub") == folder
    assert len(calls) == 2, "a complete folder asks the Hub again"


def test_a_hub_repository_without_a_required_file_is_refused(toy, hub, cache):
    snapshot, _ = hub
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"somebody/toy at c0ffee on the Hub has no model.safetensors"):
        assets.fetch_asset(toy, source="hub")
    assert not list(cache.glob("toy*"))


def test_a_hub_that_cannot_be_reached_names_the_other_source(toy, monkeypatch, cache):
    class Api:
        def repo_info(self, repo_id, revision):
            raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(ValueError, match=r"(?s)no route.*hovle fetch toy --source registry"):
        assets.fetch_asset(toy, source="hub")


def test_the_hub_folders_are_what_the_helpers_give(hub, tmp_path, cache):
    snapshot, _ = hub
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).write_text("{}")
    assert unpacked(assets.language_model(source="hub"))[1:] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert assets.teacher(source="hub").read_bytes() == WEIGHTS
    with pytest.raises(ValueError, match="easy-vqa has no copy on the Hub"):
        assets.fetch("easy-vqa", source="hub")


# Command line


def test_the_command_fetches_from_a_folder_and_prints_where(toy, wheels, tmp_path, monkeypatch, capsys, cache):
    monkeypatch.setattr(manifest_room, "MANIFEST", tmp_path / "manifest.json")
    assert cli.main(["fetch", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "not fetched" in listed
    assert f"  {toy.archive.filename}\n    python -m pip download --no-deps" in listed
    assert not cache.exists(), "--list made something"
    assert cli.main(["fetch", "toy", "--from", str(wheels)]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["toy", "teacher", "demo", "pypi", "1.0", "MIT", "0.0", "MB", str(cache / "toy-1.0")]


def test_the_command_refuses_in_one_message(capsys, wheels, cache):
    assert cli.main(["fetch", "nonsense"]) == 1
    assert "there are smollm2-135m-instruct, efficientnet-lite0, easy-vqa" in capsys.readouterr().err
    assert cli.main(["fetch", "easy-vqa", "--from", str(wheels)]) == 1
    assert "does not hold easy_vqa-1.0-py3-none-any.whl" in capsys.readouterr().err


def test_an_unknown_source_is_refused(toy):
    with pytest.raises(ValueError, match=r"source \('ftp'\) must be 'registry' or 'hub'"):
        assets.fetch_asset(toy, source="ftp")


# The manifest


@pytest.mark.parametrize("asset", assets.load_manifest().values(), ids=lambda asset: asset.name)
def test_every_asset_is_pinned_and_licensed(asset):
    assert asset.kind in ("language_model", "teacher", "dataset", "text", "font")
    assert asset.groups
    assert any(re.search(r"licen[cs]e|copyright|readme", member.to, re.IGNORECASE) for member in asset.archive.members)
    notice = (ROOT / "NOTICE").read_text()
    for fact in (asset.licence, asset.attribution, f"{asset.archive.package} {asset.archive.version}", asset.homepage):
        assert fact
        assert fact in notice
    if not {"unseen"} & set(asset.groups):
        assert not re.search(r"-SA|-NC|-ND|GPL", asset.licence), "copyleft is for tests only"
    for digest in [asset.archive.sha256, *(member.sha256 for member in asset.archive.members if member.sha256)]:
        assert len(bytes.fromhex(digest)) == 32
    name = asset.archive.package.removeprefix("@").replace("/", "-")
    begins = f"{name.replace('_', '-')}-{asset.archive.version.replace(':', '%3a')}"
    assert asset.archive.filename.replace("_", "-").startswith(begins)
    assert asset.archive.filename.endswith({"pypi": ".whl", "npm": ".tgz", "debian": ".deb"}[asset.archive.registry])
    named = [
        member for member in asset.archive.members if member.count == 1 and not re.search(r"[*?]", member.pattern)
    ]
    assert all(member.sha256 for member in named if member.size > 100_000)
    if asset.hub is not None:
        assert set(asset.hub.required) <= set(asset.hub.files)
        assert {Path(name).suffix for name in asset.hub.files} <= {".json", ".safetensors", ".txt", ".jinja"}


def test_a_manifest_of_another_format_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 1, "assets": []}')
    with pytest.raises(ValueError, match="manifest format 1; this version of hovle reads format 2"):
        assets.load_manifest(tmp_path / "manifest.json")


# Converting GGUF


def write_tiny_gguf(model, path, rule="smollm"):
    """Write a tiny Llama as llama.cpp's converter does: rotary rows interleaved, bytes as the vocabulary."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    config = model.config
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĊĊ", "ĊĊĊĊ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ", "ĊĊ ĊĊ"])  # transformers 5.16 does not read a list of one
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for projection, num_heads in heads.items():
            if projection in name:
                tensor = tensor.view(num_heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    # Through bfloat16, so that the conversion can be exact.
    return LlamaForCausalLM(config).bfloat16().float()


def test_a_converted_gguf_file_is_the_same_model_with_its_tokenizer(tiny_llama, tmp_path):
    write_tiny_gguf(tiny_llama, tmp_path / "tiny.gguf")
    target = tmp_path / "converted"
    target.mkdir()
    gguf_room.write_folder(tmp_path / "tiny.gguf", target)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(target))
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    expected = tiny_llama.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 1e5
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("a\n\n12").tokens() == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_gguf_file_with_another_rule_of_splitting_is_refused(tiny_llama, tmp_path):
    write_tiny_gguf(tiny_llama, tmp_path / "tiny.gguf", rule="llama-bpe")
    with pytest.raises(ValueError, match="by the rule 'llama-bpe'"):
        gguf_room.read_tokenizer(tmp_path / "tiny.gguf", 128)
    with pytest.raises(ValueError, match=r"has no text general\.nonsense"):
        gguf_room.header_text(tmp_path / "tiny.gguf", "general.nonsense")


def test_a_missing_gguf_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'hovle\[demo\]'"):
        gguf_room.write_folder(tmp_path / "model.gguf", tmp_path)


# The real assets, in the user's cache. `hovle fetch` brings them; offline and without them these tests fail.


def test_the_real_language_model_answers():
    folder = assets.language_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(output[0, prompt.input_ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_real_language_model_has_the_facts_of_its_gguf_file():
    folder = assets.language_model()
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"},
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config.get(key) for key in expected} == expected
    assert "quantization_config" not in config
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer("It is:\n\n 12").tokens() == ["It", "Ġis", ":", "ĊĊĠ", "1", "2"]
    assert tokenizer("hi").tokens() == ["hi"], "no bos token in front"
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_real_teacher_has_the_tensors_of_timms_model_in_order():
    import timm

    weights = torch.load(assets.teacher(), weights_only=True, map_location="cpu")
    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    assert [tensor.shape for tensor in weights.values()] == [tensor.shape for tensor in expected.values()]
    assert weights["_conv_stem.weight"].std() > 0.1


def test_the_real_easy_vqa_is_whole():
    folder = assets.easy_vqa()
    for split, num_pictures, num_questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        pictures = {path.stem for path in (folder / split / "images").iterdir()}
        assert pictures == {str(number) for number in range(num_pictures)}
        questions = json.loads((folder / split / "questions.json").read_text())
        assert len(questions) == num_questions
        assert {str(number) for _, _, number in questions} <= pictures
        assert len({answer for _, answer, _ in questions}) == 13
