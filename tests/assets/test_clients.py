"""npm and Debian packages: brought by a client on the PATH (here a stand-in), checked and taken apart."""

import gzip
import hashlib
import io
import json
import lzma
import os
import signal
import stat
import subprocess
import sys
import tarfile

import pytest
import zstandard
from places import ROOT

from hovle import assets, cli
from hovle.assets import debian, registry
from hovle.assets import manifest as manifest_room

FILES = {"package/data/a/one.svg": b"<svg/>", "package/data/b/two.svg": b"<svg></svg>", "package/LICENSE": b"free"}
KEPT = [".complete.json", "LICENSE", "data/a/one.svg", "data/b/two.svg"]
"""What `MEMBERS` takes out of `FILES` and a README."""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder of archives that the stand-ins for npm and apt-get on the PATH deliver from; calls are written down."""
    folder = tmp_path / "shop"
    folder.mkdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in CLIENTS.items():
        (programs / name).write_text(f"#!/bin/sh\necho {name} $* >> {folder}/calls\n{script.format(shop=folder)}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    return folder


CLIENTS = {
    "npm": "test -f {shop}/*.tgz || {{ echo npm error 404 Not Found >&2; exit 1; }}\ncp {shop}/*.tgz .\n",
    "apt-get": "test -f {shop}/*.deb || {{ echo E: Version 1.0 of $2 was not found >&2; exit 100; }}\n"
    "cp {shop}/*.deb .\n",
    "apt-cache": "cat {shop}/madison 2>/dev/null\n",
}


def entry(name, content=b"", kind=tarfile.REGTYPE, target=""):
    """One member of a tar with its content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(content)
    return info, content


def tar(entries):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def files(prefix):
    """`FILES` and one that nobody asked for, below another folder than `package/`."""
    named = [entry(name.replace("package/", prefix, 1), content) for name, content in FILES.items()]
    return [*named, entry(f"{prefix}README.md", b"not named")]


def write_npm(shop, extra=()):
    path = shop / "somebody-toy-1.0.tgz"
    path.write_bytes(gzip.compress(tar([*files("package/"), *extra])))
    return path


def write_deb(shop, extra=(), name="data.tar.xz", pack=lzma.compress):
    path = shop / "toy_1.0_all.deb"
    folders = [entry("./", kind=tarfile.DIRTYPE), entry("./usr", kind=tarfile.DIRTYPE)]
    path.write_bytes(
        ar(
            {"debian-binary": b"2.0\n", "control.tar.xz": b"odd"},
            name,
            pack(tar([*folders, *files("./usr/"), *extra])),
        )
    )
    return path


def ar(members, name, content):
    packed = b"!<arch>\n"
    for title, part in {**members, name: content}.items():
        packed += (
            f"{title:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
        )
    return packed


def make_asset(path, **changes):
    """What a manifest says of an archive as `write_npm` and `write_deb` make them."""
    content = path.read_bytes()
    npm = path.suffix == ".tgz"
    top = "package/" if npm else "usr/"
    entry = {
        "name": "toy",
        "kind": "dataset",
        "groups": ["smol"],
        "description": "",
        "licence": "MIT",
        "attribution": "",
        "homepage": "",
        "archive": {
            "registry": "npm" if npm else "debian",
            "package": "@somebody/toy" if npm else "toy",
            "version": "1.0",
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "members": [
                {"pattern": f"{top}data/**/*.svg", "to": "data/", "count": 2, "size": 17},
                {"pattern": f"{top}LICENSE", "to": "LICENSE", "count": 1, "size": 4},
            ],
            **changes,
        },
    }
    file = path.with_name("manifest.json")
    file.write_text(json.dumps({"format": 2, "assets": [entry], "families": []}))
    return assets.load_manifest(file)["toy"]


WRITERS = pytest.mark.parametrize("write", [write_npm, write_deb], ids=["npm", "debian"])


def unpacked(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def leftovers(cache):
    return [*cache.glob(".*"), *cache.glob("downloads/*"), *cache.glob("toy*")]


@WRITERS
def test_a_client_brings_the_archive_and_only_the_named_files_are_unpacked(write, shop, cache):
    toy = make_asset(write(shop))
    folder = assets.fetch_asset(toy)
    assert unpacked(folder) == KEPT
    assert (folder / "data/b/two.svg").read_bytes() == b"<svg></svg>"
    called = (shop / "calls").read_text()
    assert called in ("npm pack @somebody/toy@1.0 --ignore-scripts\n", "apt-get download toy=1.0\n")
    assert leftovers(cache) == [folder]
    assert assets.fetch_asset(toy) == folder
    assert (shop / "calls").read_text() == called, "a complete folder asks again"


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("data.tar", bytes),
        ("data.tar.gz", gzip.compress),
        ("data.tar.xz", lzma.compress),
        ("data.tar.zst", zstandard.ZstdCompressor(write_content_size=False).compress),
        ("data.tar.xz/", lzma.compress),
    ],
)
def test_debian_packages_are_read_in_every_compression(name, pack, shop, cache):
    assert unpacked(assets.fetch_asset(make_asset(write_deb(shop, name=name, pack=pack)))) == KEPT


def test_a_missing_zstandard_package_is_named(shop, cache, monkeypatch):
    toy = make_asset(write_deb(shop, name="data.tar.zst", pack=zstandard.ZstdCompressor().compress))
    monkeypatch.setattr(debian.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(debian.sys, "version_info", (3, 11))
    with pytest.raises(ValueError, match=r"zstandard package, which is not installed: pip install 'hovle\[deb\]'"):
        assets.fetch_asset(toy)


@WRITERS
def test_a_wrong_hash_is_refused_before_unpacking(write, shop, cache, monkeypatch):
    toy = make_asset(write(shop))
    path = write(shop, [entry("package/more", b"x")])
    monkeypatch.setattr(registry, "_unpack", None)
    with pytest.raises(ValueError, match="nothing was unpacked") as error:
        assets.fetch_asset(toy)
    assert toy.archive.sha256 in str(error.value)
    assert [path.name for path in leftovers(cache)] == [f"{path.name}.rejected"]


UNSAFE = {
    "dotdot": entry("../evil.svg", b"x"),
    "inside": entry("package/data/../../../evil.svg", b"x"),
    "absolute": entry("/tmp/evil.svg", b"x"),
    "backslash": entry("package\\evil.svg", b"x"),
    "twice": entry("{top}LICENSE", b"evil"),
}
SPECIAL = {
    "symlink": entry("{top}data/evil.svg", kind=tarfile.SYMTYPE, target="/etc/passwd"),
    "hard link": entry("{top}data/evil.svg", kind=tarfile.LNKTYPE, target="../../secret"),
    "pipe": entry("{top}data/evil.svg", kind=tarfile.FIFOTYPE),
    "device": entry("{top}data/evil.svg", kind=tarfile.CHRTYPE),
}


def placed(member, write):
    """A member whose name begins as the archive's own."""
    info, content = member
    return info.replace(name=info.name.format(top="package/" if write is write_npm else "./usr/"), deep=False), content


@pytest.mark.parametrize(
    ("write", "member"),
    [(write, member) for write in (write_npm, write_deb) for member in UNSAFE.values()]
    + [(write_npm, member) for member in SPECIAL.values()],
    ids=[f"{kind}-{what}" for kind in ("npm", "debian") for what in UNSAFE] + [f"npm-{what}" for what in SPECIAL],
)
def test_an_archive_with_an_unsafe_member_is_refused_as_a_whole(write, member, shop, tmp_path, cache):
    toy = make_asset(write(shop, [placed(member, write)]))
    with pytest.raises(ValueError, match=r"unsafe name|link or special|two files of the same name"):
        assets.fetch_asset(toy)
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(cache.glob("toy*"))


@pytest.mark.parametrize("what", SPECIAL)
def test_links_and_devices_of_a_debian_package_are_not_made(what, shop, cache):
    folder = assets.fetch_asset(make_asset(write_deb(shop, [placed(SPECIAL[what], write_deb)])))
    assert unpacked(folder) == KEPT
    assert not list(folder.rglob("*evil*"))


def test_a_dot_on_the_way_is_no_folder(shop, cache):
    """Some packages on the registry say `package/./dist/index.js`."""
    path = shop / "somebody-toy-1.0.tgz"
    members = [
        (info.replace(name=info.name.replace("/", "/./", 1), deep=False), content)
        for info, content in files("package/")
    ]
    path.write_bytes(gzip.compress(tar(members)))
    assert unpacked(assets.fetch_asset(make_asset(path))) == KEPT


def test_a_link_of_an_npm_package_is_refused_wherever_it_stands(shop, cache):
    link = entry("package/bin/run", kind=tarfile.SYMTYPE, target="../../../evil")
    with pytest.raises(ValueError, match="'package/bin/run', a link or special file"):
        assets.fetch_asset(make_asset(write_npm(shop, [link])))


@WRITERS
def test_more_files_or_bytes_than_the_manifest_says_are_refused_and_not_written(write, shop, cache, monkeypatch):
    top = "package/" if write is write_npm else "./usr/"
    toy = make_asset(write(shop, [entry(f"{top}data/c/three.svg", b"x" * 100_000)]))
    written = []
    monkeypatch.setattr(registry, "_copy", lambda entry, *rest: written.append(entry.name))
    with pytest.raises(
        ValueError, match=r"holds 3 files \(100,017 bytes\) of .*\.svg; the manifest says 2 \(17 bytes"
    ):
        assets.fetch_asset(toy)
    assert not any("three" in name for name in written)


@WRITERS
def test_an_archive_that_swells_beyond_measure_is_refused(write, shop, cache):
    toy = make_asset(write(shop, [entry("package/zeros", bytes(3 << 20))]))
    with pytest.raises(ValueError, match="unpacks to more than 200 times its size"):
        assets.fetch_asset(toy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK", "does not begin as an ar archive"),
        (ar({}, "debian-binary", b"2.0\n"), "has no data.tar"),
        (ar({}, "data.tar.bz2", b"x"), r"holds its files as data\.tar\.bz2; expected"),
        (ar({}, "data.tar", b"x" * 10)[:-3] + b"!<a", "cannot be unpacked"),
        (ar({}, "data.tar.xz", lzma.compress(b"x" * 9000)[:-20]), "cannot be unpacked"),
        (ar({}, "data.tar.zst", zstandard.compress(os.urandom(9000))[:-2000]), "cannot be unpacked"),
        (ar({}, "odd", b"x")[:50], "the header at byte 50 is damaged"),
        (ar({}, "odd", b"xy") + b"?" * 60, "the header at byte 130 is damaged"),
    ],
)
def test_what_is_no_debian_package_is_said(content, message, shop, cache):
    path = shop / "toy_1.0_all.deb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        assets.fetch_asset(make_asset(path))


def test_a_broken_npm_package_is_said(shop, cache):
    path = write_npm(shop)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"somebody-toy-1\.0\.tgz cannot be unpacked"):
        assets.fetch_asset(make_asset(path))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_npm, "needs npm, which is not on the PATH: it comes with Node.js"),
        (write_deb, "toy needs apt-get, which is not on the PATH"),
    ],
)
def test_a_missing_client_is_named_with_how_to_go_on(write, message, shop, cache, monkeypatch):
    toy = make_asset(write(shop))
    monkeypatch.setenv("PATH", str(shop))
    with pytest.raises(ValueError, match=f"(?s){message}.*hovle fetch toy --from FOLDER"):
        assets.fetch_asset(toy)
    assert unpacked(assets.fetch_asset(toy, downloads=shop)) == KEPT


@pytest.mark.parametrize(
    ("madison", "message"),
    [
        (
            "       toy |      1.3-2 | http://deb.example.org trixie/main amd64 Packages\n",
            "release has toy 1.3-2, and 1.0 is pinned",
        ),
        ("", "package lists have no toy: `apt-get update`"),
        ("toy | 1.0 | x\n", "package lists have it"),
    ],
)
def test_a_version_that_the_release_does_not_have_is_explained(madison, message, shop, cache):
    toy = make_asset(write_deb(shop))
    (shop / toy.archive.filename).unlink()
    (shop / "madison").write_text(madison)
    with pytest.raises(ValueError, match=r"apt-get could not download toy 1\.0") as error:
        assets.fetch_asset(toy)
    said = str(error.value)
    assert "E: Version 1.0 of toy=1.0 was not found" in said
    assert message in said
    assert "snapshot.debian.org/binary/toy/" in said
    assert "hovle fetch toy --from FOLDER" in said


def test_what_npm_says_is_passed_on(shop, cache):
    toy = make_asset(write_npm(shop))
    (shop / toy.archive.filename).unlink()
    with pytest.raises(
        ValueError, match=r"npm could not download @somebody/toy 1.0 \(exit code 1\):\n  npm error 404"
    ):
        assets.fetch_asset(toy)


def test_a_client_that_brings_another_file_is_told(shop, cache):
    toy = make_asset(write_npm(shop))
    (shop / toy.archive.filename).rename(shop / "toy-1.1.tgz")
    with pytest.raises(ValueError, match=r"was to bring somebody-toy-1\.0\.tgz and brought toy-1\.1\.tgz"):
        assets.fetch_asset(toy)


FETCH = """
import importlib, pathlib, sys, types
# The folder as a bare package: importing hovle itself would cost seconds for torch.
sys.modules["hovle"] = types.ModuleType("hovle")
sys.modules["hovle"].__path__ = [{package!r}]
assets = importlib.import_module("hovle.assets")
assets.fetch_asset(assets.load_manifest(pathlib.Path({manifest!r}))["toy"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@WRITERS
def test_a_fetch_killed_in_the_middle_is_finished_by_the_next(write, shop, cache):
    toy = make_asset(write(shop))
    client = shop.parent / "bin" / ("npm" if write is write_npm else "apt-get")
    script = client.read_text()
    client.write_text(
        f"#!/bin/sh\necho half > {toy.archive.filename}; mkfifo {shop}/go; echo > {shop}/go; exec sleep 600\n"
    )
    program = FETCH.format(package=str(ROOT / "hovle"), manifest=str(shop / "manifest.json"))
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    while not (shop / "go").exists():
        assert process.poll() is None
    (shop / "go").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert stat.S_ISFIFO((shop / "go").stat().st_mode)
    assert len(leftovers(cache)) == 2  # half a download, an empty staging folder
    client.write_text(script)
    folder = assets.fetch_asset(toy)
    assert unpacked(folder) == KEPT
    assert leftovers(cache) == [folder]


# Groups and families


def test_a_group_brings_all_it_can_and_names_what_it_could_not(shop, cache, monkeypatch, capsys):
    make_asset(write_npm(shop))
    content = json.loads((shop / "manifest.json").read_text())
    (toy,) = content["assets"]
    missing = {**toy, "name": "other", "archive": {**toy["archive"], "registry": "debian", "package": "other"}}
    demo = {**toy, "name": "small", "groups": ["demo"]}
    (shop / "manifest.json").write_text(json.dumps({**content, "assets": [missing, toy, demo]}))
    monkeypatch.setattr(manifest_room, "MANIFEST", shop / "manifest.json")
    assert cli.main(["fetch", "smol"]) == 1
    captured = capsys.readouterr()
    assert "other: apt-get could not download" in captured.err
    [row] = [line.split() for line in captured.out.splitlines() if line.startswith("toy")]
    assert row == ["toy", "dataset", "smol", "npm", "1.0", "MIT", "0.0", "MB", str(cache / "toy-1.0")]
    assert unpacked(cache / "toy-1.0") == KEPT
    assert "small" not in captured.out
    assert cli.main(["fetch"]) == 0
    assert unpacked(cache / "small-1.0") == KEPT
    assert "other" not in capsys.readouterr().out
    assert cli.main(["fetch", "--list"]) == 0
    assert "apt-get download other=1.0" in capsys.readouterr().out
    assert cli.main(["fetch", "smoll"]) == 1
    assert "there are other, toy, small; groups of them are smol, demo" in capsys.readouterr().err


def test_a_family_declares_many_packages_that_differ_in_little(tmp_path):
    like = {
        "name": "font-{id}",
        "kind": "font",
        "groups": ["fonts"],
        "description": "{id}, a typeface",
        "licence": "OFL-1.1",
        "attribution": "the {id} authors",
        "homepage": "https://example.org/{id}",
        "archive": {
            "registry": "npm",
            "package": "@fonts/{id}",
            "members": [{"pattern": "package/*.ttf", "to": "./"}, {"pattern": "package/LICENSE", "to": "LICENSE"}],
        },
    }
    pins = {"version": "1.2", "sha256": "0" * 64, "size": 5, "files": [[18, 900], [1, 40]]}
    packages = [{"id": "lobster", **pins}, {"id": "roboto", **pins, "version": "2.0"}]
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"format": 2, "assets": [], "families": [{"like": like, "packages": packages}]}))
    found = assets.load_manifest(path)
    assert list(found) == ["font-lobster", "font-roboto"]
    assert found["font-roboto"].archive.filename == "fonts-roboto-2.0.tgz"
    assert [(member.count, member.size) for member in found["font-lobster"].archive.members] == [(18, 900), (1, 40)]


@pytest.mark.parametrize(
    ("pattern", "name", "kept"),
    [
        ("a/*.png", "a/1.png", "1.png"),
        ("a/*.png", "a/b/1.png", None),
        ("a/**/*.png", "a/1.png", "1.png"),
        ("a/**/*.png", "a/b/c/1.png", "b/c/1.png"),
        ("a/*/x/*.png", "a/b/x/1.png", "b/x/1.png"),
        ("a/b.txt", "a/b.txt", "b.txt"),
        ("**/*.ttf", "ttf", None),
    ],
)
def test_patterns_match_as_a_shell_does_and_keep_what_they_left_open(pattern, name, kept):
    assert registry.matches(name, pattern) == (kept is not None)
    if kept is not None:
        assert registry.kept_path(name, pattern) == kept
