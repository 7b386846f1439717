"""Composition of conf/ and the command line into a RunConfig."""

from __future__ import annotations

import pytest
import yaml

from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.compose import GROUPS, compose, conf_dir, group_options
from molmo2_nemo.settings.run import PUBLISHED_STAGES, OptimConfig, RunConfig
from molmo2_nemo.settings.schema import load_yaml, to_yaml


def test_the_example_of_the_readme():
    cfg = compose(["recipe=tiny", "stage=sft", "parallel.tensor=2", "stage.max_steps=20"])
    assert (cfg.model.preset, cfg.stage.name, cfg.parallel.tensor, cfg.stage.max_steps) == ("tiny", "sft", 2, 20)
    assert cfg.data.image.crop_size == 126 and cfg.data.tokenizer == "tiny"


# The published numbers, typed in again from the table of stages: steps, micro-batch, rates (connector, vit, llm),
# warm-ups, tokens, crops, frames, dropout (all, response), seed.
PUBLISHED = {
    "pretrain": (32000, 4, (2e-4, 6e-6, 2e-5), (200, 2000, 2000), 2536, 16, 16, (0.0, 0.1), 95818),
    "sft": (30000, 2, (5e-6, 5e-6, 1e-5), (200, 200, 200), 16384, 128, 128, (0.1, 0.0), 50189),
    "long": (2000, 1, (5e-6, 5e-6, 1e-5), (200, 200, 200), 36864, 384, 384, (0.1, 0.0), 50189),
}


@pytest.mark.parametrize("recipe", ["4b", "8b", "o7b"])
@pytest.mark.parametrize("stage", PUBLISHED_STAGES)
def test_large_recipes_have_the_published_numbers(recipe, stage):
    cfg = compose([f"recipe={recipe}", f"stage={stage}"])
    steps, micro, rates, warmups, tokens, crops, frames, dropout, seed = PUBLISHED[stage]
    optim = cfg.stage.optim
    groups = (optim.connector, optim.vit, optim.llm)
    assert (cfg.model.preset, cfg.stage.name) == (recipe, stage)
    assert (cfg.stage.max_steps, cfg.stage.global_batch_size, cfg.stage.micro_batch_size) == (steps, 128, 1)
    assert yaml.safe_load((conf_dir() / "stage" / f"{stage}.yaml").read_text())["stage"]["micro_batch_size"] == micro
    assert tuple(g.lr for g in groups) == rates and tuple(g.warmup_steps for g in groups) == warmups
    assert (cfg.data.packing.sequence_length, cfg.data.packing.max_crops) == (tokens, crops)
    assert cfg.data.packing.buffer_size == 48 and cfg.data.packing.crop_value == (1.0 if stage == "pretrain" else 30.0)
    assert (cfg.data.video.max_frames, cfg.data.video.max_fps) == (frames, 2.0)
    assert (cfg.stage.residual_dropout, cfg.stage.response_residual_dropout) == dropout
    assert (cfg.seed, cfg.data.seed) == (6198, seed)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip_grad) == (0.9, 0.95, 1e-6, 0.0, 1.0)
    assert cfg.stage.z_loss == 1e-4 and optim.final_lr_fraction == 0.1
    assert not cfg.stage.train_base_embedding
    text = cfg.data.text
    if stage == "pretrain":
        assert (text.prompt_templates, text.system_prompt, text.point_format) == (
            "none",
            "style_and_length_v2",
            "html-v1",
        )
        assert not text.root_length_weight and not text.root_branches_weight
    else:
        formats = (text.prompt_templates, text.system_prompt, text.point_format)
        assert formats == ("uber_model_v2", "demo_or_style_v2", "html-v2")
        assert text.root_length_weight and text.root_branches_weight


@pytest.mark.parametrize("stage", PUBLISHED_STAGES)
def test_tiny_keeps_the_published_rules(stage):
    cfg, big = compose(["recipe=tiny", f"stage={stage}"]), compose(["recipe=8b", f"stage={stage}"])
    assert cfg.data.text == big.data.text
    assert cfg.stage.z_loss == big.stage.z_loss and cfg.stage.optim.clip_grad == big.stage.optim.clip_grad
    assert (cfg.stage.optim.beta1, cfg.stage.optim.beta2, cfg.stage.optim.eps) == (0.9, 0.95, 1e-6)
    assert cfg.data.sources["demo"].path.endswith(f"/{stage}")


def test_every_choice_of_every_group_composes():
    for group in GROUPS:
        for choice in group_options(group):
            assert isinstance(compose([f"{group}={choice}"]), RunConfig)


def test_the_command_line_wins_over_the_recipe():
    cfg = compose(
        ["recipe=tiny", "stage=long", "parallel=tp2sp", "stage.optim.llm.lr=3e-5", "data.sources.demo.rate=0.5"]
    )
    assert (cfg.parallel.tensor, cfg.parallel.sequence, cfg.parallel.context) == (2, True, 1)
    assert cfg.stage.optim.llm.lr == 3e-5 and cfg.data.sources["demo"].rate == 0.5


def test_a_source_can_be_added():
    mine = ["data.sources.mine.path=/shards/a=b", "data.sources.mine.weight=0.2"]
    cfg = compose(["recipe=8b", "data=molmo2", *mine])
    assert list(cfg.data.sources) == ["mine"]
    assert cfg.data.sources["mine"].path == "/shards/a=b" and cfg.data.sources["mine"].weight == 0.2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stage.max_step=3", "did you mean 'stage.max_steps'?"),
        ("stge=sft", "did you mean 'stage'?"),
        ("max_steps=3", "unknown setting 'max_steps'; did you mean 'stage.max_steps'?"),
        ("lr=1e-4", "'stage.optim.vit.lr' or 'stage.optim.connector.lr' or 'stage.optim.llm.lr'?"),
        ("optim.llm.lr=1e-4", "did you mean 'stage.optim.llm.lr'?"),
        ("sft.stage.max_steps=3", "a setting of the stage sft alone is written sft:stage.max_steps"),
        (
            "sft:stage.max_steps=3",
            "sft: before a setting is for molmo2 pipeline, which runs several stages; write",
        ),
        ("stage=sftt", "did you mean 'sft'?"),
        ("recipe=tini", "did you mean 'tiny'?"),
        ("data.image.pol=3", "did you mean 'data.image.pool'?"),
        ("data.sources.demo.pth=x", "did you mean 'data.sources.demo.path'?"),
        ("+stage.extra=1", "unknown setting 'stage.extra'"),
        ("stage.max_steps=many", "stage.max_steps is 'many'; expected a whole number"),
        ("stage.train_vit=3", "expected true or false"),
        ("model.visual_attention=all", "expected one of: image_tokens, within_image, none"),
        ("cluster.precision=fp16", "expected one of: fp32, bf16"),
        ("stage.optim.llm=5", "stage.optim.llm must be a group of settings"),
        ("stages=sft", "stages must be a list, not 'sft'; write it in brackets, stages=[...]"),
        ("data.lengths={share: 1}", "data.lengths must be a list, not {share: 1}; write it in brackets, data.lengths"),
        ("max_steps", "key=value"),
        ("stage.max_steps=[1,", "is a bracket or quote missing?"),
    ],
)
def test_mistakes_get_one_line_that_helps(override, expected):
    with pytest.raises(UserError) as error:
        compose(["recipe=tiny", override])
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["/a/step=9-last", "/a/(b) c", "/tmp/é", "a'b", "null"])
def test_paths_need_no_quotes(path):
    assert compose(["recipe=tiny", f"init_from={path}"]).init_from == (None if path == "null" else path)


def test_own_configurations_are_found(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("tokenizer: tiny\nsources:\n  a: {path: /shards/a}\n")
    cfg = compose(["recipe=tiny", "data=mine"], tmp_path)
    assert list(cfg.data.sources) == ["a"]
    with pytest.raises(UserError, match="did you mean 'mine'"):
        compose(["recipe=tiny", "data=mne"], tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        compose(["recipe=tiny"], tmp_path / "absent")


@pytest.mark.parametrize("content", [b"\xff\xfe not UTF-8", b"sources: [1", b"- a list"])
def test_a_damaged_file_of_the_users_is_named(tmp_path, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError, match="data/mine") as error:
        compose(["recipe=tiny", "data=mine"], tmp_path)
    assert "\n" not in str(error.value)


def test_leaving_out_what_is_not_there():
    with pytest.raises(UserError, match="no data.sources.demo to leave out; data=molmo2 is without data sets"):
        compose(["recipe=4b", "stage=sft", "~data.sources.demo"])
    with pytest.raises(UserError, match="^~stage.optim.absent: .* no stage.optim.absent to leave out$"):
        compose(["recipe=tiny", "~stage.optim.absent"])


def test_unknown_key_in_a_file_of_the_users(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("image: {crop_sise: 126}\n")
    with pytest.raises(UserError, match="did you mean 'data.image.crop_size'"):
        compose(["recipe=tiny", "data=mine"], tmp_path)


def test_yaml_round_trip(tmp_path):
    cfg = compose(["recipe=tiny", "stage=long"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(cfg))
    assert load_yaml(path) == cfg
    values = yaml.safe_load(path.read_text())
    assert values["stage"]["optim"]["beta2"] == OptimConfig().beta2
    path.write_text("stage: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_yaml(path)


def test_a_data_set_can_be_taken_out():
    cfg = compose(["recipe=tiny", "stage=sft", "~data.sources.demo", "data.sources.mine.path=shards/data"])
    assert list(cfg.data.sources) == ["mine"]


def test_texts_extend_a_context():
    """As docs/data.md has it: nothing is missing but what the machine brings."""
    asked = ["recipe=8b", "stage=extend", "data=text", "model.rope_scaling=yarn", "model.rope_factor=4"]
    cfg = compose(asked)
    assert (cfg.stage.name, list(cfg.data.sources), cfg.data.text.document_mask) == ("extend", ["text"], False)
    lacking = [problem.partition(":")[0] for problem in find_problems(cfg)]
    assert lacking == ["data.sources.text", "data.tokenizer=tokenizer"]
