"""What is refused before any process starts."""

from __future__ import annotations

import pytest

from data_prep.demo import build_demo
from molmo2_nemo.cli.checks import check, find_problems, wanted_processes
from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.compose import STAGES, compose
from molmo2_nemo.settings.schema import to_yaml


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    build_demo(folder)
    return folder


def tiny(shards, *overrides, stage="sft"):
    """The tiny recipe's stage on the demo's shards."""
    return compose(["recipe=tiny", f"stage={stage}", f"data.sources.demo.path='{shards}/{stage}'", *overrides])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", ["recipe", "single", "dp2", "tp2", "tp2sp", "cp2", "pp2", "tp2cp2"])
def test_the_shipped_layouts_pass(shards, stage, layout):
    assert list(find_problems(tiny(shards, f"parallel={layout}", stage=stage))) == []


@pytest.mark.parametrize("recipe", ["4b", "8b", "o7b"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_large_recipes_lack_only_data_and_tokenizer(recipe, stage):
    problems = list(find_problems(compose([f"recipe={recipe}", f"stage={stage}"])))
    expected = ("data.sources", "data.tokenizer", "6 of 6 data sets", "118 of 118 data sets")
    assert all(p.startswith(expected) for p in problems), problems


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.preset=tinny"], "did you mean 'tiny'?"),
        (["parallel.tensor=3", "parallel.sequence=false"], "does not divide the 4 query heads"),
        (["parallel.tensor=4"], "does not divide the 2 key/value heads"),
        (["parallel=cp2", "parallel.context=8"], "parallel.context=8 ranks would deal the 4 query heads"),
        (["parallel=pp2", "parallel.pipeline=3"], "does not divide the 4 layers"),
        (["parallel=cp2", "data.packing.sequence_length=511"], "is not a multiple of context = 2; 510 is"),
        (["parallel=tp2sp", "data.packing.sequence_length=513"], "is not a multiple of context * tensor = 2"),
        (["parallel=single", "parallel.sequence=true"], "needs parallel.tensor > 1"),
        (["parallel=cp2", "cluster.devices=1"], "processes are needed for one replica but there are only 1"),
        (["parallel=cp2", "cluster.devices=3"], "cannot be divided into replicas"),
        (["stage.global_batch_size=3", "parallel=dp2"], "4 is"),
        (["data.image.crop_size=378"], "set data.image.crop_size=126"),
        (["data.packing.sequence_length=8192"], "more than the 4096 positions"),
        (["data.video.max_frames=500"], "a pack holds data.packing.max_crops="),
        (["data.sources.demo.path=/absent"], "/absent"),
        (["data.sources.more.rate=1"], "data.sources.more.path is not set"),
        (["data.sources.demo.rate=-1"], "cannot be negative"),
        (["data.sources.demo.rate=0"], "nothing to train on"),
        (["data.tokenizer=/absent"], "tokenizer.json"),
        (["init_from=/absent"], "no such checkpoint folder"),
        (["stage.max_steps=0"], "must be at least 1"),
        (["parallel.tensor=0"], "must be at least 1"),
        (["stage.name=a/b"], "may not be empty or hold a slash"),
    ],
)
def test_each_mistake_is_named(shards, overrides, expected):
    problems = list(find_problems(tiny(shards, *overrides)))
    assert any(expected in p for p in problems), problems


def test_all_problems_are_listed_at_once(shards):
    with pytest.raises(UserError) as error:
        check(tiny(shards, "parallel.tensor=3", "data.image.crop_size=378", "data.sources.demo.path=/absent"))
    text = str(error.value)
    assert (
        all(word in text for word in ("parallel.tensor=3", "crop_size", "/absent")) and "settings cannot work" in text
    )


def test_context_larger_than_the_processes_of_a_job(shards):
    with pytest.raises(UserError, match="there are only 1"):
        check(tiny(shards, "parallel=cp2"), processes=1)


def test_no_sources():
    assert any("nothing to train on" in p for p in find_problems(compose(["recipe=8b", "data=molmo2"])))


def test_missing_data_sets_of_a_published_mix_are_one_problem(tmp_path):
    recipe = ["recipe=8b", "data.tokenizer=tiny", f"data.root='{tmp_path}'"]
    problems = list(find_problems(compose(recipe)))
    assert len(problems) == 1 and "118 of 118 data sets have no shards: " in problems[0]
    problems = list(find_problems(compose([*recipe, "data.missing=skip"])))
    assert len(problems) == 1 and "nothing to train on" in problems[0]
    problems = list(find_problems(compose([*recipe, "data.missing=skip", "data.sources.tulu4.group=nlpp"])))
    assert any("no such group" in p for p in problems)


def test_a_cut_shard_is_named(shards, tmp_path):
    build_demo(tmp_path)
    shard = min((tmp_path / "sft").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    problems = list(find_problems(tiny(tmp_path)))
    assert len(problems) == 1 and shard.name in problems[0]


def test_a_checkpoint_of_another_model(shards, tmp_path):
    checkpoint = tmp_path / "sft" / "checkpoints" / "step=9-last"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").mkdir()
    (tmp_path / "sft" / "config.yaml").write_text(to_yaml(compose(["recipe=8b", "stage=sft"])))
    problems = list(find_problems(tiny(shards, f"init_from='{checkpoint}'")))
    assert len(problems) == 1 and "checkpoint of model '8b'" in problems[0]


def test_processes():
    assert wanted_processes(compose(["recipe=tiny", "parallel=tp2cp2"])) == 4
    assert wanted_processes(compose(["recipe=8b", "stage=long"])) == 128


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("checkpoint.keep_last=0", "keep_last=0: must be at least 1"),
        ("checkpoint.keep_every=30", "must be a multiple of save_every=20"),
        ("faults.max_in_a_row=-1", "stops at the first bad step"),
        ("faults.spike_sigma=0", "must be above 0, or null"),
        ("faults.spike_window=2", "at least 4 steps"),
        ("log.peak_tflops=-1", "must be above 0"),
        ("validation.every=0", "validation.every=0: must be at least 1"),
        ("validation.sources.held.rate=1", "validation.sources.held.path is not set"),
        ("validation.sources.held.path=/absent", "validation.sources.held: "),
    ],
)
def test_settings_of_a_running_trainer(setting, said):
    problems = list(find_problems(compose(["recipe=tiny", "stage=sft", setting])))
    assert any(said in problem for problem in problems), problems
