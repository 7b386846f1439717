"""What is refused before any process starts."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from typing import get_type_hints

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.settings import ranges
from molmo2_nemo.settings.checks import check, file_problems, find_problems
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.run import PUBLISHED_STAGES, RunConfig
from molmo2_nemo.settings.sizes import wanted_processes

GROUPS = ("parallel=cp2", "parallel.dynamic_context=true", "parallel.context_tokens=512")
SHORT = "data.lengths=[{sequence_length: %d}, {sequence_length: 768}]"


def tiny(shards, *overrides, stage="sft"):
    """The tiny recipe's stage on the demo's shards."""
    return compose(["recipe=tiny", f"stage={stage}", f"data.sources.demo.path='{shards}/{stage}'", *overrides])


@pytest.mark.parametrize("stage", PUBLISHED_STAGES)
@pytest.mark.parametrize("layout", ["recipe", "single", "dp2", "tp2", "tp2sp", "cp2", "pp2", "tp2cp2"])
def test_the_shipped_layouts_pass(shards, stage, layout):
    assert list(find_problems(tiny(shards, f"parallel={layout}", stage=stage))) == []


@pytest.mark.parametrize("more", [(), ("parallel.pipeline=2",), ("parallel.tensor=2", "parallel.sequence=true")])
def test_several_lengths_pass_in_dynamic_groups_on_pictures_and_films(shards, more):
    assert list(find_problems(tiny(shards, *GROUPS, SHORT % 256, *more))) == []


@pytest.mark.parametrize("recipe", ["4b", "8b", "o7b"])
@pytest.mark.parametrize("stage", PUBLISHED_STAGES)
def test_the_large_recipes_lack_only_data_and_tokenizer(recipe, stage):
    problems = list(find_problems(compose([f"recipe={recipe}", f"stage={stage}"])))
    expected = ("data.sources", "data.tokenizer", "6 of 6 data sets", "118 of 118 data sets")
    assert all(p.startswith(expected) for p in problems), problems


ROPE = ("model.rope_scaling=yarn", "model.rope_factor=4", "data.packing.sequence_length=8192")
TWO_PHASES = (
    "data.progression=[{until_step:1,sequence_length:64,rope_factor:2},{until_step:2,sequence_length:64,rope_factor:1}]",
)
CHUNKS = ("memory.recompute=full", "memory.sequence_chunk=64")
FSDP = ["parallel=dp2", "parallel.fsdp=megatron"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.preset=tinny"], "did you mean 'tiny'?"),
        (["parallel.tensor=3", "parallel.sequence=false"], "does not divide the 4 query heads"),
        (["parallel.tensor=4"], "does not divide the 2 key/value heads"),
        (["parallel=cp2", "parallel.context=8"], "parallel.context=8 ranks would shard the 4 query heads"),
        (["parallel=pp2", "parallel.pipeline=3"], "does not divide the 4 layers"),
        (["parallel=cp2", "data.packing.sequence_length=511"], "is not a multiple of context = 2; 510 is"),
        ([*GROUPS, SHORT % 255], "data.lengths[0].sequence_length=255 is not a multiple of context = 2; 254 is"),
        ([*GROUPS, SHORT % 500], "data.lengths[0].sequence_length=500: a step of "),
        ([*GROUPS, SHORT % 256, "parallel.context_tokens=256"], "packs of 768 tokens do not fit on 2 ranks"),
        (["parallel=tp2sp", "data.packing.sequence_length=513"], "is not a multiple of context * tensor = 2"),
        (["parallel=single", "parallel.sequence=true"], "needs parallel.tensor > 1"),
        (["parallel=cp2", "cluster.devices=1"], "processes are needed for one replica but there are only 1"),
        (["parallel=cp2", "cluster.devices=3"], "cannot be divided into replicas"),
        (["stage.global_batch_size=3", "parallel=dp2"], "4 is"),
        (["data.image.crop_size=378"], "set data.image.crop_size=126"),
        (["data.packing.sequence_length=8192"], "more than the 4096 positions"),
        (["model.rope_scaling=yarn", "model.rope_factor=inf"], "needs model.rope_factor > 1, not inf"),
        (["model.rope_scaling=linear", "model.rope_factor=nan"], "needs model.rope_factor > 1, not nan"),
        (["model.rope_base=1e7"], "model.rope_base=1e+07 needs model.rope_scaling=base"),
        (["model.rope_scaling=base", "model.rope_factor=2", "model.rope_base=5"], "must be a number above the model's"),
        ([*ROPE, "data.progression=[{until_step:1,sequence_length:512,rope_factor:8}]"], "beyond the progression"),
        (
            [*ROPE, "data.progression=[{until_step:1,sequence_length:6000,rope_factor:1}]"],
            "below the progression: packs",
        ),
        ([*ROPE, *TWO_PHASES], "data.progression[1].rope_factor=1: must be at least 2, the phase before it"),
        (["data.progression=[{until_step:1,sequence_length:64,rope_factor:2}]"], "model.rope_scaling=none follows no"),
        (["data.text.shuffle_chunks=4"], "set data.text.document_mask=false, or data.text.shuffle_chunks=null"),
        (
            ["data.text.shuffle_chunks=1", "data.text.document_mask=false"],
            "data.text.shuffle_chunks=1: must be at least",
        ),
        (
            ["data.sources.demo.length_rates=[{tokens:9,rate:1},{tokens:4,rate:2}]"],
            "demo.length_rates[1].tokens=4: must",
        ),
        (["memory.recompute=selective", "memory.recompute_modules=[]"], "expected some of core_attn, mlp"),
        (["memory.recompute_attention=true"], "no effect with memory.recompute=none; set memory.recompute=full"),
        (["memory.recompute_layers=2"], "no effect with memory.recompute=none"),
        (["memory.recompute=selective", "memory.recompute_layers=2"], "no effect with memory.recompute=selective"),
        (["memory.recompute=full", "memory.recompute_layers=0"], "memory.recompute_layers=0: expected at least 1"),
        (["memory.recompute=full", "memory.recompute_layers=3", "parallel=pp2"], "tiny model has only 2"),
        (
            ["memory.sequence_chunk=64"],
            "memory.sequence_chunk=64 with memory.recompute=none: layers that work in chunks",
        ),
        ([*CHUNKS, "memory.sequence_chunk=0"], "memory.sequence_chunk=0: must be at least 1"),
        ([*CHUNKS, "memory.recompute_layers=1"], "all layers work in chunks, and are recomputed"),
        ([*CHUNKS, "model.attention=flex"], "use model.attention=auto, or memory.sequence_chunk=null"),
        ([*CHUNKS, "parallel=tp2sp", "memory.sequence_chunk=63"], "do not divide it; 64 they do"),
        ([*CHUNKS, "memory.sequence_chunk=99999"], "memory.sequence_chunk=99999 has no effect: packs have "),
        ([*CHUNKS, "cluster.precision=fp8"], "memory.sequence_chunk=64 with cluster.precision=fp8: "),
        (["memory.optimizer_offload=true"], "=true with cluster.precision=fp32: Megatron keeps its distributed"),
        (
            ["memory.optimizer_offload=true", "cluster.precision=bf16", "parallel.distributed_optimizer=false"],
            "set parallel.distributed_optimizer=true, or memory.optimizer_offload=false",
        ),
        (
            ["parallel=single", "parallel.fsdp=megatron"],
            "parallel.fsdp=megatron has no effect with 1 process: there is nobody to",
        ),
        ([*FSDP, "parallel.distributed_optimizer=false"], "set parallel.distributed_optimizer=true, or parallel.fsdp="),
        (["parallel=tp2cp2", "parallel.fsdp=megatron"], "with parallel.tensor=2: the two together were not tried"),
        (["parallel=pp2", "parallel.fsdp=megatron"], "set parallel.pipeline=1, or parallel.fsdp=none"),
        ([*FSDP, "parallel.overlap_grad_reduce=false"], "always sends beside computation; set parallel.overlap_grad"),
        ([*FSDP, "memory.recompute=full", "memory.sequence_chunk=64"], "set memory.sequence_chunk=null, or parallel."),
        ([*FSDP, "memory.recompute=full", "memory.offload=true"], "set memory.offload=false, or parallel.fsdp=none"),
        ([*FSDP, "memory.optimizer_offload=true"], "set memory.optimizer_offload=false, or parallel.fsdp=none"),
        ([*FSDP, "cluster.precision=fp8"], "with cluster.precision=fp8: the two together were not tried; set cluster"),
        ([*FSDP, "validation.sources.a.path=/absent"], "leave validation.sources out and use molmo2 evaluate on the"),
        ([*FSDP, "evaluation.tasks=[needle]"], "with evaluation.tasks: ranks have unequally many packs"),
        ([*FSDP, "stage.train_vit=false", "data.feature_cache.path=/x"], "set data.feature_cache.path=null, or parall"),
        (["stage.lora.rank=-1"], "expected a rank of at least 1"),
        (["stage.lora.rank=4", "stage.lora.targets=[head]"], "some of linear_qkv, linear_proj"),
        (["parallel.context_tokens=768"], "no effect without parallel.dynamic_context=true"),
        (["parallel=cp2", "parallel.cp_comm_type=all_gather"], "no effect where all context ranks (here 2)"),
        (["parallel=cp2", "parallel.ring_balance=cost"], "no effect where all context ranks (here 2)"),
        (["data.video.max_frames=500"], "a pack holds data.packing.max_crops="),
        (["data.sources.demo.path=/absent"], "/absent"),
        (["data.sources.more.rate=1"], "data.sources.more.path is not set"),
        (["data.sources.demo.rate=-1"], "data.sources.demo.rate=-1.0: must be at least 0"),
        (["data.sources.demo.rate=0"], "nothing to train on"),
        (["data.tokenizer=/absent"], "tokenizer.json"),
        (["init_from=/absent"], "no such checkpoint folder"),
        (["stage.max_steps=0"], "must be at least 1"),
        (["parallel.tensor=0"], "must be at least 1"),
        (["stage.name=a/b"], "may not be empty or hold a slash"),
        (["stage.name=.."], "stage.name=.."),
        (["stage.name=slurm"], "stage.name=slurm"),
        (["output_dir="], "output_dir='': names the folder"),
        (["data.image.margin=99"], "hold more than two margins"),
        (["data.video.subtitle_mode=framed"], "known are frame_N"),
        (["data.video.decoder=nvdec", "data.num_workers=2"], "decoding workers cannot use the GPU"),
    ],
)
def test_each_mistake_is_named(shards, overrides, expected):
    problems = list(find_problems(tiny(shards, *overrides)))
    assert any(expected in p for p in problems), problems


OTHER_CHECKS = (  # of several settings together, or of the model
    *("model.rope_factor", "model.rope_base", "stage.lora.rank", "stage.lora.alpha", "memory.recompute_layers"),
    *("parallel.context_ulysses", "parallel.context_crops", "checkpoint.keep_last", "checkpoint.keep_every"),
    *("faults.max_in_a_row", "faults.max_total", "faults.spike_sigma", "faults.spike_window", "log.peak_tflops"),
)


def numbers(cls=RunConfig, path=""):
    """Dotted names of the schema's numbers."""
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, f"{path}{name}.")
        elif hint in (int, float, int | None, float | None):
            yield path + name


def test_every_number_has_a_range():
    ranged = {*ranges.CLOSED, *ranges.ABOVE_0, *ranges.BELOW_1}
    assert not ranged & set(OTHER_CHECKS)
    assert ranged <= set(numbers()) <= ranged | set(OTHER_CHECKS)


@pytest.mark.parametrize("name", sorted({*ranges.CLOSED, *ranges.ABOVE_0, *ranges.BELOW_1}))
def test_numbers_out_of_range(name):
    cfg = compose(["recipe=tiny", "stage=sft"])
    assert list(ranges.out_of_range(cfg)) == []
    *groups, last = name.split(".")
    owner = functools.reduce(getattr, groups, cfg)
    low, high = ranges.CLOSED.get(name, (0, 1 if name in ranges.BELOW_1 else None))
    assert not isinstance(getattr(owner, last), bool)
    refused = [
        low - 1,
        float("nan"),
        *([high + 1] if high is not None else []),
        *([0] if name in ranges.ABOVE_0 else []),
    ]
    for value in refused:
        setattr(owner, last, value)
        problems = list(ranges.out_of_range(cfg))
        assert len(problems) == 1 and problems[0].startswith(f"{name}={value}: must be "), problems
    if name in ranges.CLOSED:
        setattr(owner, last, low)
        assert list(ranges.out_of_range(cfg)) == []


@pytest.mark.parametrize("setting", ["rate=nan", "rate=-1", "weight=-1", "size_factor=-1", "p_high_res=2"])
@pytest.mark.parametrize("group", ["data", "validation"])
def test_numbers_of_data_sets(shards, group, setting):
    problems = list(
        find_problems(tiny(shards, f"{group}.sources.x.path='{shards}/sft'", f"{group}.sources.x.{setting}"))
    )
    assert len(problems) == 1 and problems[0].startswith(f"{group}.sources.x.{setting.split('=')[0]}="), problems


def test_settings_are_checked_without_files(shards):
    """As for a run that will see another file system."""
    absent = tiny(shards, "data.sources.demo.path=/absent", "data.tokenizer=/absent", "init_from=/absent")
    assert list(find_problems(absent, files=False)) == [] and len(list(file_problems(absent))) == 3
    wrong = tiny(shards, "data.sources.demo.group=x", "validation.sources.held.rate=1", "data.sources.more.path=")
    problems = list(find_problems(wrong, files=False))
    assert len(problems) == 3 and all(p.startswith(("data.sources.", "validation.sources.")) for p in problems)


def test_a_file_where_the_run_would_write(shards, tmp_path):
    (tmp_path / "file").write_text("")
    problems = list(find_problems(tiny(shards, f"output_dir='{tmp_path}/file/run'")))
    assert problems == [f"output_dir={tmp_path}/file/run: {tmp_path}/file is a file; name a folder"]
    for name, what in (("file/x", f"there is no folder {tmp_path}/file"), ("", "it is a folder")):
        problems = list(find_problems(tiny(shards, f"data.quarantine='{tmp_path}/{name}'")))
        assert len(problems) == 1 and what in problems[0], problems
    assert list(find_problems(tiny(shards, f"data.quarantine='{tmp_path}/bad.jsonl'"))) == []


@pytest.mark.parametrize(
    ("size", "kind", "length", "factor"),
    [("8b", "none", 100_000, 3), ("8b", "linear", 100_000, 3), ("o7b", "none", 100_000, 13), ("4b", "yarn", 40_000, 2)],
)
def test_following_the_advice_on_longer_packs_ends_in_a_run(size, kind, length, factor):
    """Also where a factor was taken that does not suffice."""
    run = [f"recipe={size}", "stage=long", "data=molmo2", "parallel=single", f"data.packing.sequence_length={length}"]
    too_small = [] if kind == "none" else [f"model.rope_scaling={kind}", "model.rope_factor=1.0001"]

    def about_length(*overrides):
        return [p for p in find_problems(compose([*run, *overrides])) if "positions" in p or "rope" in p]

    problems = about_length(*too_small)
    advice = f"model.rope_scaling={'linear' if kind == 'linear' else 'yarn'} model.rope_factor={factor}"
    assert len(problems) == 1 and problems[0].endswith(f"take {advice}"), problems
    assert about_length(*advice.split()) == []


def test_a_factor_at_most_the_models_own_is_refused():
    for factor in (2, 7, 8):
        choice = ["model.rope_scaling=yarn", f"model.rope_factor={factor}"]
        problems = list(find_problems(compose(["recipe=o7b", "stage=long", *choice])))
        assert any("has YaRN of factor 8 over 8192 positions already" in p for p in problems), problems


FROZEN = ["stage.train_vit=false", "stage.train_connector=false"]


@pytest.mark.parametrize("choices", [["stage.train_llm=false"], ["stage.train_llm=false", "stage.lora.rank=4"]])
def test_a_run_in_which_nothing_learns(choices):
    for recipe, base in (("4b", False), ("8b", False), ("tiny", True)):
        cfg = compose([f"recipe={recipe}", "stage=sft", *FROZEN, *choices, f"stage.train_base_embedding={base}"])
        refused = any(p.startswith("nothing is trainable") for p in find_problems(cfg))
        assert refused == (not base or len(choices) == 2)  # the base rows wait beside adapters
        cfg.stage.train_llm = True
        assert not any(p.startswith("nothing is trainable") for p in find_problems(cfg))


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        (["stage.lora.norms=true"], "stage.lora.norms has no effect with stage.lora.rank=0"),
        (["stage.lora.norms=true", "stage.lora.embeddings=true"], "stage.lora.norms, stage.lora.embeddings has no"),
        (
            ["stage.lora.rank=4", "stage.lora.embeddings=true", "stage.train_llm=false"],
            "stage.lora.embeddings has no effect with stage.train_llm=false",
        ),
        (["stage.lora.rank=4", "stage.optim.beside_adapters.lr=1e-4"], "stage.optim.beside_adapters has no effect"),
        (["stage.optim.beside_adapters.warmup_steps=5"], "stage.optim.beside_adapters has no effect"),
        (["stage.optim.beside_adapters.lr=-1"], "stage.optim.beside_adapters.lr=-1.0: must be at least 0"),
        (["stage.lora.rank=4", "stage.lora.norms=true", "stage.optim.beside_adapters.lr=1e-4"], None),
    ],
)
def test_what_trains_beside_adapters(choices, problem):
    found = [
        p for p in find_problems(compose(["recipe=4b", "stage=sft", *choices])) if "beside_adapters" in p or "lora" in p
    ]
    assert found == [] if problem is None else any(p.startswith(problem) for p in found), found


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


def test_variables_that_name_folders_are_named(monkeypatch):
    """Whether they are set is said, too."""
    for name in ("MOLMO2_DATA", "MOLMO2_TOKENIZER"):
        monkeypatch.delenv(name, raising=False)
    data, tokenizer = find_problems(compose(["recipe=8b", "stage=sft"]))
    assert data.endswith("They are looked for in data.root=shards, which MOLMO2_DATA (not set) names")
    assert tokenizer.endswith("MOLMO2_TOKENIZER, which names it, is not set")
    monkeypatch.setenv("MOLMO2_DATA", "/absent/data")
    data, _ = find_problems(compose(["recipe=8b", "stage=sft"]))
    assert data.endswith("They are looked for in data.root=/absent/data, which MOLMO2_DATA names")


def test_the_demo_s_shards_are_made_by_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOLMO2_DEMO_DATA", raising=False)
    (problem,) = find_problems(compose(["recipe=tiny", "stage=sft", "parallel=single"]))
    assert "no folder at demo/data/sft" in problem and problem.endswith("`molmo2 demo` makes the demo's.")


def test_missing_data_sets_of_a_published_mix_are_one_problem(tmp_path):
    recipe = ["recipe=8b", "data.tokenizer=tiny", f"data.root='{tmp_path}'"]
    problems = list(find_problems(compose(recipe)))
    assert len(problems) == 1 and "118 of 118 data sets have no shards: " in problems[0]
    problems = list(find_problems(compose([*recipe, "data.missing=skip"])))
    assert len(problems) == 1 and "nothing to train on" in problems[0]
    problems = list(find_problems(compose([*recipe, "data.missing=skip", "data.sources.tulu4.group=nlpp"])))
    assert any("no such group" in p for p in problems)


def test_a_cut_shard_is_named(shards, tmp_path):
    shutil.copytree(shards / "sft", tmp_path / "sft")
    shard = min((tmp_path / "sft").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    problems = list(find_problems(tiny(tmp_path)))
    assert len(problems) == 1 and shard.name in problems[0]


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


def test_features_of_an_encoder_that_is_trained_are_not_kept(shards, tmp_path):
    kept = f"data.feature_cache.path={tmp_path}/kept"
    (problem,) = find_problems(tiny(shards, kept))
    assert "stage.train_vit=false" in problem and "features of a crop in every step" in problem
    assert list(find_problems(tiny(shards, kept, "stage.train_vit=false"))) == []
    (problem,) = find_problems(tiny(shards, "data.feature_cache.together=4"))
    assert "data.feature_cache.together=null" in problem
    (problem,) = find_problems(tiny(shards, "data.feature_cache.verify=0.1", "stage.train_vit=false"))
    assert "no effect without data.feature_cache.path" in problem
    (tmp_path / "file").write_text("")
    (problem,) = find_problems(tiny(shards, f"data.feature_cache.path={tmp_path}/file/kept", "stage.train_vit=false"))
    assert f"{tmp_path}/file is a file" in problem
    problems = list(find_problems(tiny(shards, kept, "stage.train_vit=false", "data.feature_cache.max_gib=0")))
    assert problems == ["data.feature_cache.max_gib=0.0: must be above 0"]
