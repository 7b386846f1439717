"""Imported wordings in a run: the fingerprint in its settings, the copy in its folder, resuming, asking its model."""

from __future__ import annotations

import shutil

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.convert.checkpoints import run_settings
from molmo2_nemo.data.published_wordings import read_checkout
from molmo2_nemo.data.wordings import OWN_WORDINGS, load, pin, save, wordings_of
from molmo2_nemo.errors import UserError
from molmo2_nemo.inference.load import trained_data
from molmo2_nemo.rundir.config_file import read_config, use_kept_templates, write_config
from molmo2_nemo.rundir.paths import templates_copy
from molmo2_nemo.rundir.resume import refuse_other_run
from molmo2_nemo.settings.checks import file_problems
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.schema import load_yaml
from tests.support.official_shape import write_checkout


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "wordings.json"
    save(read_checkout(write_checkout(tmp_path / "checkout")).wordings, path)
    return path


def other(tmp_path):
    """A file with one wording more."""
    path = tmp_path / "other.json"
    folder = write_checkout(tmp_path / "second", pixmo=("NO_POINT_PREFIX = [", "NO_POINT_PREFIX = ['a request: ',"))
    save(read_checkout(folder).wordings, path)
    return path


def composed(tmp_path, *settings):
    return compose(["recipe=tiny", "stage=sft", f"output_dir={tmp_path / 'run'}", *settings])


def trained(tmp_path, *settings):
    """A stage that has a checkpoint."""
    cfg = composed(tmp_path, *settings)
    write_config(cfg)
    (tmp_path / "run" / "sft" / "checkpoints" / "step=3").mkdir(parents=True)
    return cfg


def test_settings_have_the_fingerprint_and_the_run_a_copy(file, tmp_path):
    cfg = trained(tmp_path, f"data.text.templates={file}")
    sha = load(file).fingerprint()
    assert cfg.data.text.templates_sha256 == sha
    copy = templates_copy(tmp_path / "run", sha)
    assert copy.read_bytes() == file.read_bytes()
    again = read_config(tmp_path / "run" / "sft" / "config.yaml")
    assert again is not None and again.data.text == cfg.data.text
    file.unlink()
    write_config(cfg)  # as at the end of a run: the copy is there
    assert load(copy).fingerprint() == sha


def test_without_a_file_nothing_is_different(tmp_path):
    cfg = trained(tmp_path)
    assert (cfg.data.text.templates, cfg.data.text.templates_sha256) == (None, None)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["sft"]
    assert wordings_of(cfg.data.text) is OWN_WORDINGS


def test_other_wordings_are_not_gone_on_with(file, tmp_path):
    trained(tmp_path, f"data.text.templates={file}")
    refuse_other_run(composed(tmp_path, f"data.text.templates={file}"))
    moved = tmp_path / "moved.json"
    shutil.move(file, moved)
    refuse_other_run(composed(tmp_path, f"data.text.templates={moved}"))
    copy = next((tmp_path / "run").glob("templates-*.json"))
    refuse_other_run(composed(tmp_path, f"data.text.templates={copy}"))
    for settings in ([f"data.text.templates={other(tmp_path)}"], []):
        with pytest.raises(UserError, match="data.text.templates_sha256 was '[0-9a-f]{64}', is now"):
            refuse_other_run(composed(tmp_path, *settings))


def test_a_run_with_our_own_wordings_does_not_go_on_with_others(file, tmp_path):
    trained(tmp_path)
    with pytest.raises(UserError, match="data.text.templates_sha256 was None, is now"):
        refuse_other_run(composed(tmp_path, f"data.text.templates={file}"))


def problems(cfg):
    return [p for p in file_problems(cfg) if p.startswith("data.text.templates")]


def test_files_that_cannot_be_used_are_problems_before_the_start(file, tmp_path):
    assert problems(composed(tmp_path, f"data.text.templates={file}")) == []
    (problem,) = problems(composed(tmp_path, f"data.text.templates={tmp_path / 'gone.json'}"))
    assert "no such file" in problem and "a run's folder has a copy" in problem
    (problem,) = problems(composed(tmp_path, f"data.text.templates={file}", "data.text.templates_sha256=0123456789ab"))
    assert "the settings are for 0123456789ab" in problem
    file.write_text(file.read_text().replace("made pointing 3", "made pointing three"))
    (problem,) = problems(composed(tmp_path, f"data.text.templates={file}"))
    assert "was edited" in problem


def test_settings_that_were_composed_elsewhere_are_pinned_at_the_start(file, tmp_path):
    gone = composed(tmp_path, f"data.text.templates={tmp_path / 'later.json'}")
    assert gone.data.text.templates_sha256 is None
    write_config(gone)
    shutil.copy(file, tmp_path / "later.json")
    cfg = load_yaml(tmp_path / "run" / "sft" / "config.yaml")
    pin(cfg.data.text)
    assert cfg.data.text.templates_sha256 == load(file).fingerprint()


def test_a_model_is_asked_with_the_copy(file, tmp_path):
    cfg = trained(tmp_path, f"data.text.templates={file}")
    checkpoint = tmp_path / "run" / "sft" / "checkpoints" / "step=3"
    file.unlink()
    text = trained_data(checkpoint, None, run_settings(checkpoint)).text
    assert text.templates == str(templates_copy(tmp_path / "run", str(cfg.data.text.templates_sha256)))
    assert wordings_of(text).lists["pointing"][0].startswith("made pointing")


def test_a_run_reads_its_copy(file, tmp_path):
    """Whoever edits or removes the file while the run lasts does not end it."""
    cfg = trained(tmp_path, f"data.text.templates={file}")
    file.write_text("{}")
    use_kept_templates(cfg.data.text, tmp_path / "run")
    assert wordings_of(cfg.data.text).lists["pointing"][0].startswith("made pointing")
    plain = composed(tmp_path)
    use_kept_templates(plain.data.text, tmp_path / "run")
    assert plain.data.text.templates is None


def test_a_preview_shows_them(file, tmp_path, shards, capsys):
    """Packs of the demo's shards: their captions and points are asked for with the file's wordings."""
    out = tmp_path / "page"
    settings = ["recipe=tiny", "stage=sft", f"data.root={shards}", f"data.text.templates={file}"]
    assert main(["preview", str(shards / "sft"), *settings, "--packs", "2", "--out", str(out)]) == 0
    page = (out / "index.html").read_text()
    assert "made pointing" in page or "made point_count" in page or "made long_caption" in page
    file.write_text("{}")
    assert main(["preview", str(shards / "sft"), *settings, "--out", str(out)]) == 2
    assert "is not a file of wordings" in capsys.readouterr().err
