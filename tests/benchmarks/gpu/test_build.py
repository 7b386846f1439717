"""Building a kit: for which machine, what goes in, what its size may be. Nothing is fetched here."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import build
from benchmarks.gpu.build import ROOT, arguments, check_size, largest, listed, overlay, project_files
from tests.benchmarks.gpu.test_manifest import archive, write


def test_the_listed_machine_keeps_its_own_and_has_other_versions_shadowed():
    there = listed("3.12", "x86_64")
    pins = overlay.pins(there)
    asked = {"transformers": ["huggingface_hub<1.0", "tokenizers<0.23"], "nemo-toolkit": ["lightning<=2.4.0"]}
    plan = overlay.make_plan(
        there,
        pins,
        overlay.roots(),
        lambda names: {name: [overlay.Requirement(line) for line in asked.get(name, [])] for name in names},
    )
    assert overlay.refusals(there) == [] and plan.mode == "overlay"
    assert {"transformers", "huggingface-hub", "tokenizers", "lightning"} <= set(plan.shadowed)
    assert {"nemo-toolkit", "megatron-core", "av", "lhotse"} <= set(plan.entering)
    assert not {"torch", "numpy", "triton", "pandas", "pyarrow", "protobuf", "scipy"} & set(plan.entering)


def test_the_project_goes_in_without_fixtures():
    files = set(project_files())
    assert {"pyproject.toml", "benchmarks/gpu/run.py", "tests/gpu/test_attention.py", "tests/conftest.py"} <= files
    assert not [name for name in files if name.startswith(("tests/fixtures/", "benchmarks/results/"))]
    for part in ("molmo2_nemo", "data_prep", "conf", "recipes", "tests/support"):
        assert [name for name in files if name.startswith(f"{part}/")], part
    assert sum((ROOT / name).stat().st_size for name in files) < 8 * 2**20


@pytest.fixture
def kit(tmp_path):
    (tmp_path / "kit").mkdir()
    files = {f"molmo2-overlay/site/{name}/big.py": "#" * size for name, size in (("small", 9), ("large", 3 << 20))}
    archive(tmp_path / "kit" / "overlay.tar.xz", files, tmp_path)
    (tmp_path / "kit" / "project.tar.xz").write_bytes(bytes(2 << 20))
    return tmp_path / "kit"


def test_a_kit_over_its_limit_is_refused_with_its_largest_parts(kit):
    manifest = write(kit)
    check_size(kit, manifest, 2.5, 60.0)
    with pytest.raises(build.TooLargeError) as refused:
        check_size(kit, manifest, 1.5, 60.0)
    assert "2.0 MiB, over its limit of 1.5 MiB. Largest parts, unpacked: large 3.0, small 0.0" in str(refused.value)
    assert "--leave-out NAME" in str(refused.value)
    with pytest.raises(build.TooLargeError, match="with the project's 63.0 MiB over 64 MiB"):
        check_size(kit, manifest, 2.5, 63.0)


def test_the_largest_are_folders_of_the_site():
    members = [("molmo2-overlay/site/a/b.py", 1 << 20), ("molmo2-overlay/site/a/c/d.py", 1 << 20)]
    assert largest([*members, ("molmo2-overlay/site/e.py", 1 << 19)]) == "a 2.0, e.py 0.5"


def test_a_folder_that_is_no_kit_is_left_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("it went on to build"))
    (tmp_path / "mine").write_text("mine")
    assert build.main(["--out", str(tmp_path)]) == 2
    assert "is no kit, or has files beside one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("manifest", ['{"step": 4}', "{}", "[]", "no JSON"])
def test_a_folder_with_another_kind_of_manifest_is_left_alone(tmp_path, capsys, monkeypatch, manifest):
    """A checkpoint has a manifest.json, too."""
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("it went on to build"))
    (tmp_path / "manifest.json").write_text(manifest)
    assert build.main(["--out", str(tmp_path)]) == 2
    assert "is no kit, or has files beside one" in capsys.readouterr().err
    assert (tmp_path / "manifest.json").read_text() == manifest


def test_what_lies_beside_a_kit_is_left_alone(kit, capsys, monkeypatch):
    """A run begun in the kit's folder leaves its results there."""
    write(kit)
    assert build.may_replace(kit)
    (kit / "gpu-results").mkdir()
    assert build.may_replace(kit)
    (kit / "gpu-results" / "page.md").write_text("# GPU check")
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("it went on to build"))
    assert build.main(["--out", str(kit)]) == 2
    assert "has files beside one (such as its results)" in capsys.readouterr().err
    assert (kit / "gpu-results" / "page.md").is_file()


def test_a_place_for_no_folder_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("it went on to build"))
    (tmp_path / "file").write_text("mine")
    for place, said in (("file", "is no kit"), ("file/below/kit", "Not a directory")):
        assert build.main(["--out", str(tmp_path / place)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--machine", "potato"], ["--limit", "-5"], ["--limit", "nan"], ["--there", "no/such/file"]]
)
def test_what_cannot_be_built_is_refused_at_once(words, capsys):
    with pytest.raises(SystemExit):
        arguments(words)
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_package_to_leave_out_that_there_is_none_of_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "pack_overlay", lambda *_: pytest.fail("it went on to pack"))
    with pytest.raises(build.PackageError, match="--leave-out nosuch: no package"):
        build.build(arguments(["--leave-out", "av", "nosuch"]), tmp_path)


def test_a_build_that_is_ended_leaves_the_old_kit_and_nothing_else(kit, monkeypatch):
    write(kit)
    monkeypatch.setattr(build, "build", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = sorted(kit.parent.rglob("*"))
    former = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="ended by a signal"):
            build.main(["--out", str(kit)])
    finally:
        signal.signal(signal.SIGTERM, former)
    assert sorted(kit.parent.rglob("*")) == before


def test_what_fails_leaves_the_old_kit(kit, capsys, monkeypatch):
    write(kit)

    def fail(args, folder):
        raise build.PackageError("pip download failed")

    monkeypatch.setattr(build, "build", fail)
    before = sorted(kit.parent.rglob("*"))
    assert build.main(["--out", str(kit)]) == 2
    assert "kit: pip download failed" in capsys.readouterr().err
    assert sorted(kit.parent.rglob("*")) == before


@pytest.mark.parametrize("glibc", ["2.3", "3.1", "new"])
def test_a_c_library_that_no_wheel_is_for_is_refused(glibc, capsys):
    with pytest.raises(SystemExit):
        arguments(["--glibc", glibc])
    assert "expected a version such as 2.34" in capsys.readouterr().err


def test_the_stand_in_for_the_video_decoder_says_so_when_it_is_used():
    path = Path(build.__file__).parent / "stand_in" / "av" / "__init__.py"
    spec = importlib.util.spec_from_file_location("av", path, submodule_search_locations=[str(path.parent)])
    own = {name: module for name, module in sys.modules.items() if name == "av" or name.startswith("av.")}
    for name in own:
        del sys.modules[name]
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules["av"] = module
        spec.loader.exec_module(module)
        assert issubclass(module.error.FFmpegError, Exception)
        with pytest.raises(RuntimeError, match="no video decoder .*--with-video"):
            module.open("a.mp4")
    finally:
        for name in [n for n in sys.modules if n == "av" or n.startswith("av.")]:
            del sys.modules[name]
        sys.modules |= own
