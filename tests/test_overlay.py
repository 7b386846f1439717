"""requirements/overlay.py: what comes beside an environment, that this stays as it is, and what is packed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
HERE = ".".join(map(str, sys.version_info[:2]))


def _load():
    sys.path.insert(0, str(ROOT / "requirements"))
    try:
        spec = spec_from_file_location("molmo2_overlay_script", ROOT / "requirements" / "overlay.py")
        module = module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "requirements"))


overlay = _load()
PINS = {
    "torch": "torch==2.13.0",
    "megatron-core": "megatron-core==0.16.1",
    "numpy": "numpy==1.26.4",
    "nemo-toolkit": "nemo-toolkit==2.7.3",
    "transformers": "transformers==4.57.6",
    "huggingface-hub": "huggingface_hub==0.36.2",
    "datasets": "datasets==5.0.1",
    "webdataset": "webdataset==1.0.2",
    "braceexpand": "braceexpand==0.1.7",
    "protobuf": "protobuf==5.29.6",
}
ROOTS = [Requirement(line) for line in ("torch>=2.6", "nemo-toolkit>=2.7,<2.8", "transformers>=4.55,<5", "webdataset")]
ASKED = {
    "nemo-toolkit": [
        *("protobuf~=5.29.5", "numpy<2", 'braceexpand==9; platform_system == "Windows"'),
        *('datasets<5.1; extra == "llm"', 'webdataset<1; extra == "llm"', 'transformers<4.57; extra == "tts"'),
    ],
    "transformers": ["huggingface_hub<1.0,>=0.34"],
    "webdataset": ["braceexpand"],
}


def environment(**installed: str | tuple[str, str]):
    """An environment of Python 3.12 that has these, as a version or as (version, what it asks for)."""
    found = {}
    for name, text in installed.items():
        seen, *requires = (text,) if isinstance(text, str) else text
        found[name.replace("_", "-")] = overlay.Installed(seen, requires)
    return overlay.Environment("3.12", found, {**overlay.default_environment(), "extra": ""})


def plan(there, roots=ROOTS):
    return overlay.make_plan(
        there, PINS, roots, lambda names: {n: [Requirement(r) for r in ASKED.get(n, [])] for n in names}
    )


COMPLETE = dict(
    torch="2.10.0a0+b4e4ee8",
    megatron_core="0.16.0rc0",
    numpy="1.26.4",
    nemo_toolkit="2.7.0",
    transformers="4.57.1",
    huggingface_hub="0.35.0",
    webdataset="1.0.2",
)


def test_an_image_with_nemo_gets_only_what_it_lacks_and_nothing_of_its_own_is_replaced():
    there = {k: v for k, v in COMPLETE.items() if k != "webdataset"}
    found = plan(environment(**there))
    assert (found.mode, found.entering, found.shadowed) == ("add", ["braceexpand", "webdataset"], [])
    assert plan(environment(**COMPLETE)).entering == []


def test_an_image_without_nemo_gets_it_in_a_folder_with_all_that_it_lacks():
    found = plan(environment(torch="2.11.0", megatron_core="0.17.0", numpy="1.26.4", protobuf="5.29.9"))
    assert found.mode == "overlay" and found.shadowed == []
    left = {"torch", "megatron-core", "numpy", "protobuf"}  # protobuf is what NeMo asks for, though not the pin
    assert set(found.entering) == set(PINS) - left


def test_other_versions_are_shadowed_with_those_that_ask_for_them():
    there = {**COMPLETE, "transformers": "5.12.1", "huggingface_hub": "1.23.0"}
    found = plan(
        environment(**there, datasets=("4.4.0", "huggingface-hub>=1.0"), accelerate=("1.0", "huggingface_hub>=1"))
    )
    assert found.mode == "overlay"
    assert (
        found.entering == found.shadowed == ["huggingface-hub", "transformers"]
    )  # datasets is not wanted: NeMo is there
    assert "within molmo2, accelerate of the environment does not find huggingface_hub>=1" in found.notes
    del there["nemo_toolkit"]
    found = plan(environment(**there, datasets=("4.4.0", "huggingface-hub>=1.0"), protobuf="6.33.0"))
    assert found.shadowed == ["datasets", "huggingface-hub", "protobuf", "transformers"]
    found = plan(environment(**there, datasets=("4.4.0", "huggingface-hub>=0.24", "legacy (metadata")))
    assert "datasets" not in found.entering
    found = plan(environment(**there, datasets="6.0"))
    assert "datasets" in found.shadowed  # NeMo's part that is used says so
    assert "webdataset" not in found.entering  # the pin itself is not what NeMo asks for, and works


def test_what_is_compiled_for_the_image_stays_whatever_asks_for_another():
    found = plan(environment(torch="2.11.0", megatron_core="0.19.2", numpy="2.5.0", triton="3.6.0"))
    assert not {"torch", "megatron-core", "numpy", "triton"} & set(found.entering)
    assert "numpy 2.5.0 stays, though nemo-toolkit asks for <2" in found.notes
    unnamed = environment(torch="2.11.0", numpy="2.5.0")
    assert "megatron-core" in plan(unnamed).entering  # a machine with torch alone
    unnamed.unnamed.append("megatron-core")
    assert "megatron-core" not in plan(unnamed).entering


@pytest.mark.parametrize(
    ("python", "installed", "said"),
    [
        ("3.12", {}, "no torch is here, torch>=2.6"),
        ("3.12", {**COMPLETE, "megatron_core": "0.15.3"}, "megatron-core 0.15.3 is here, >=0.16"),
        ("3.12", {**COMPLETE, "torch": "2.5.1"}, "torch 2.5.1 is here, >=2.6"),
        ("3.12", {**COMPLETE, "numpy": "1.24.0"}, "numpy 1.24.0 is here"),
        ("3.10", COMPLETE, "Python 3.10 is here, 3.11 or 3.12 is needed"),
    ],
)
def test_wrong_environments_are_refused_with_what_is_there_and_what_is_needed(python, installed, said):
    there = environment(**installed)
    there.python = python
    (problem,) = overlay.refusals(there)
    assert said in problem
    assert overlay.refusals(environment(**COMPLETE)) == []


@pytest.mark.parametrize("python", overlay.PYTHONS)
def test_everything_that_may_be_lacking_is_pinned(python):
    there = overlay.elsewhere(python, "x86_64", None)
    pins = overlay.pins(there)
    asked = {overlay.canonicalize_name(r.name): r for r in overlay.roots()}
    assert set(asked) <= set(pins)
    for name, requirement in asked.items():
        assert overlay.fits(pins[name].partition("==")[2], requirement.specifier), pins[name]


def wheel(
    folder: Path, name: str, number: str, files: dict[str, str], requires: tuple[str, ...] = (), python: str = ">=3.10"
) -> None:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}", f"Requires-Python: {python}"]
    lines += [f"Requires-Dist: {r}" for r in requires]
    info = f"{name}-{number}.dist-info"
    about = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-{number}-py3-none-any.whl", "w") as file:
        for path, text in {**files, f"{info}/METADATA": "\n".join(lines) + "\n", f"{info}/WHEEL": about}.items():
            file.writestr(path, text)
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """Wheels as pip fetches and unpacks them: another packaging than the environment's, and what that asks for."""
    tmp_path = tmp_path_factory.mktemp("overlay")
    (tmp_path / "index").mkdir()
    files = {"packaging/__init__.py": "", "packaging/tests/test_it.py": "", "packaging/fast.pyx": ""}
    files |= {"careless/__init__.py": "from . import (\n    tests,\n)\n", "careless/tests/__init__.py": ""}
    wheel(tmp_path / "index", "packaging", "0.1", files, ("mdurl>=0.1",))
    wheel(tmp_path / "index", "mdurl", "0.1.2", {"mdurl/__init__.py": ""})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
        wheels = overlay.Wheels(tmp_path / "wheels")
        wheels.fetch(["packaging==0.1", "mdurl==0.1.2"])
        assert [str(r) for r in wheels.requires("packaging")] == ["mdurl>=0.1"]
        wheels.lay_out(["packaging", "mdurl"], tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def site(laid_out, tmp_path):
    """An overlay's folder of packages, with its record and its command."""
    folder = tmp_path / "overlay" / "site"
    shutil.copytree(laid_out, folder)
    pins = {"packaging": "packaging==0.1"}
    there = environment(**COMPLETE)
    overlay.write_record(folder, there, overlay.Plan(["packaging"], ["packaging"], "overlay", []), pins)
    overlay.write_command(folder.parent, sys.executable, HERE)
    return folder


def test_pip_says_why_a_pin_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(overlay.PackageError, match="pip download failed:(.|\n)*packaging==0.1"):
        overlay.Wheels(tmp_path).fetch(["packaging==0.1"])


def test_packages_for_a_newer_python_than_this_one_are_laid_out(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    wheel(tmp_path / "index", "newer", "1", {"newer/__init__.py": ""}, python=">=3.14")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheels = overlay.Wheels(tmp_path / "wheels", "3.14")
    wheels.fetch(["newer==1"])
    wheels.lay_out(["newer"], tmp_path / "site")
    assert (tmp_path / "site" / "newer" / "__init__.py").is_file()


def test_looking_for_pip_changes_nothing_here(tmp_path):
    script = "import wheels, pathlib; wheels.Wheels(pathlib.Path())._find_pip(); import setuptools"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "requirements")}
    subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, check=True)


def test_the_environment_is_compared_with_what_it_was(site):
    before = overlay.snapshot()
    inside = overlay.snapshot(site)
    assert before["packages"]["packaging"] == version("packaging") != inside["packages"]["packaging"] == "0.1"
    assert overlay.check(before, overlay.snapshot(), inside) == []
    assert overlay.check(before, inside, None) == [f"packaging was {version('packaging')}, now 0.1"]
    (site / "new-1.dist-info").mkdir()
    (site / "new-1.dist-info" / "METADATA").write_text("Name: new\nVersion: 1\n")
    (site / "numpy").mkdir()
    (site / "numpy" / "__init__.py").write_text("")
    shadowing = overlay.snapshot(site)
    said = overlay.check(before, shadowing, shadowing)
    assert "new has come into the environment" in said
    assert any(line.startswith("import numpy was ") for line in said)
    assert any(line.startswith(f"within molmo2, numpy is {site}") for line in said)


@pytest.mark.parametrize("archive", ["it.tar.gz", "it.tar.xz"])
def test_the_packed_command_alone_looks_into_its_folder(archive, site, tmp_path):
    count, _ = overlay.pack(site.parent, tmp_path / archive)
    with tarfile.open(tmp_path / archive) as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / "there", filter="data")
    assert len(names) == count and "molmo2-overlay/site/packaging/__init__.py" in names
    assert [n for n in names if "tests" in n] == ["molmo2-overlay/site/careless/tests/__init__.py"]  # imports them
    assert not [n for n in names if "pycache" in n or n.endswith(".pyx")]
    command = tmp_path / "there" / "molmo2-overlay" / "bin" / "molmo2"
    assert command.stat().st_mode & 0o111
    link = tmp_path / "molmo2"
    link.symlink_to(command)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    stack = "import sys; from molmo2_nemo.launch.overlay import find_overlay, origin_of; o = find_overlay(); "
    stack += "print(o and o.command, origin_of('packaging'), origin_of('numpy'))"
    bare = subprocess.run([sys.executable, "-c", stack], env=env, text=True, capture_output=True, cwd=tmp_path)
    assert bare.stdout == "None environment environment\n"
    (tmp_path / "molmo2_nemo").mkdir()  # the folder that it is called in is not looked into
    done = subprocess.run([link, "--version"], env=env, text=True, capture_output=True, cwd=tmp_path)
    assert done.stdout.startswith("molmo2_nemo ") and done.returncode == 0, done.stderr
    env["PYTHONPATH"] = os.pathsep.join([str(command.parents[1] / "site"), str(ROOT)])
    inside = subprocess.run([sys.executable, "-c", stack], env=env, text=True, capture_output=True, cwd=tmp_path)
    assert inside.stdout == f"{command} overlay environment\n"


def test_the_command_refuses_another_python(site):
    overlay.write_command(site.parent, sys.executable, "3.9")
    done = subprocess.run([site.parent / "bin" / "molmo2", "--version"], text=True, capture_output=True)
    assert done.returncode == 2
    assert "are for Python 3.9, " in done.stderr and f"is {HERE}; set MOLMO2_PYTHON" in done.stderr


def test_what_pip_inspects_elsewhere(tmp_path):
    said = {
        "installed": [{"metadata": {"name": "Torch", "version": "2.11.0", "requires_dist": ["sympy"]}}],
        "environment": {"python_version": "3.12", "platform_machine": "x86_64", "sys_platform": "linux"},
    }
    path = tmp_path / "there.json"
    path.write_text(json.dumps(said))
    assert overlay.elsewhere("3.12", "x86_64", path).installed["torch"].requires == ["sympy"]
    with pytest.raises(overlay.PackageError, match="made by Python 3.12, but --python is 3.11"):
        overlay.elsewhere("3.11", "x86_64", path)
    with pytest.raises(overlay.PackageError, match="made on x86_64, but --machine is aarch64: give --machine x86_64"):
        overlay.elsewhere("3.12", "aarch64", path)
    said["environment"]["sys_platform"] = "darwin"
    path.write_text(json.dumps(said))
    with pytest.raises(overlay.PackageError, match="made on darwin"):
        overlay.elsewhere("3.12", "x86_64", path)


def inspected(environment: object = None, **metadata: object) -> str:
    there = {"python_version": "3.12", "platform_machine": "x86_64", "sys_platform": "linux"}
    return json.dumps({"installed": [{"metadata": metadata}], "environment": environment or there})


@pytest.mark.parametrize(
    "text, said",
    [
        ("torch==2.11.0\n", "JSONDecodeError"),
        pytest.param("[" * 100_000, "RecursionError", id="deep"),
        ("[]", "TypeError"),
        (inspected(name="torch", version=None), "version of torch is None, expected a text"),
        (inspected(name=["torch"], version="2"), "name is .*expected a text"),
        (inspected(name="nemo", version="2", requires_dist="transformers<4"), "'transformers<4', expected a list"),
        (inspected(name="nemo", version="2", requires_dist=[3]), "requires_dist of nemo is 3"),
        (inspected(["3.12"], name="nemo", version="2"), "AttributeError"),
        (inspected({"python_version": 3.12}, name="nemo", version="2"), "python_version is 3.12, expected a text"),
    ],
)
def test_what_pip_does_not_print_is_refused(text, said, tmp_path):
    path = tmp_path / "there.json"
    path.write_text(text)
    with pytest.raises(overlay.PackageError, match="not what `python -m pip inspect` prints") as refused:
        overlay.elsewhere("3.12", "x86_64", path)
    assert re.search(said, str(refused.value))


def test_one_of_folder_and_archive(tmp_path, capsys):
    for arguments in ([], [str(tmp_path), "--archive", "x"]):
        with pytest.raises(SystemExit):
            overlay.main(arguments)
    capsys.readouterr()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["F", "--machine", "aarch64", "--glibc", "2.28"], "--machine, --glibc: for another machine"),
        (["F", "--python", "3.12"], "--python: for another machine"),
        (["F", "--there", "x.json"], "--there: for another machine"),
        (["--archive", "x.tar.gz", "--glibc", "2.3"], "2.17 is the oldest"),
        (["--archive", "x.tar.gz", "--glibc", "3.1"], "not a version such as 2.34"),
        (["--archive", "x.tar.gz", "--glibc", "2.34.1"], "not a version such as 2.34"),
        (["--pins", "3.12", "--archive", "x.tar.gz", "--dry-run"], "leave out --dry-run, archive"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        overlay.main(arguments)
    assert said in capsys.readouterr().err


@pytest.fixture
def no_wheels(monkeypatch):
    """Fetching fails the test: what is refused must be refused before."""
    monkeypatch.setattr(overlay, "build_project", lambda *_: pytest.fail("it went on to build and fetch"))


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([str(Path(sysconfig.get_path("scripts")).parent)], "has the environment's own commands"),
        (["made"], "made/site is there already: remove it"),
        (["command"], "command/bin/molmo2 is there already: remove it"),
        (["file"], "file is not a folder"),
        (["file/below/it"], "file is not a folder"),
        (["bin"], "bin/bin is not a folder"),
        (["dangling"], "dangling is not a folder"),
        (["--archive", "made.tar.gz"], "made.tar.gz is a folder: name a file"),
        (["--archive", "none/it.tar.gz"], "there is no folder"),
        (["--archive", "file/it.tar.gz"], "file is not a folder"),
        (["--archive", "it.zip"], "name it .tar.gz"),
    ],
)
def test_wrong_targets_are_refused_before_anything_is_fetched(
    arguments, said, tmp_path, monkeypatch, capsys, no_wheels
):
    monkeypatch.chdir(tmp_path)
    for folder in ("made/site", "made.tar.gz", "command/bin", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "command" / "bin" / "molmo2").symlink_to("nowhere")
    (tmp_path / "dangling").symlink_to("nowhere")
    for file in ("file", "bin/bin"):
        (tmp_path / file).touch()
    before = sorted(tmp_path.rglob("*"))
    assert overlay.main(arguments) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_target_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(overlay.PackageError, match="cannot be written to"):
        overlay.check_folder(tmp_path / "new" / "folder")
    with pytest.raises(overlay.PackageError, match="cannot be written to"):
        overlay.check_archive(tmp_path / "it.tar.gz")


def test_an_archive_that_fails_leaves_nothing_behind(site, tmp_path):
    (tmp_path / "it.tar.gz").mkdir()
    with pytest.raises(OSError):
        overlay.pack(site.parent, tmp_path / "it.tar.gz")
    assert not list(tmp_path.glob(".it*"))
