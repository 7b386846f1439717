"""Plans: the published figures come out, the best layout is one that trains, and what cannot fit is refused."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.cost.efficiency import EFFICIENCIES
from molmo2_nemo.cost.hardware import DEVICES, parse_cluster
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.step import step_time
from molmo2_nemo.cost.workload import averages, workload
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import LoraConfig, preset
from molmo2_nemo.plan.layouts import layouts
from molmo2_nemo.plan.memory import GIB, USABLE, memory
from molmo2_nemo.plan.published import HOURS, published_gpu_hours
from molmo2_nemo.plan.search import candidates, configured, search, weigh
from molmo2_nemo.plan.words import plan_words
from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.sizes import wanted_processes


@pytest.mark.parametrize("name", HOURS)
def test_published_hours_come_out(name):
    """Stage 3 as the paper ran it, 128 H100: within a quarter."""
    work = workload(compose([f"recipe={name}", "stage=long"]))
    hours = published_gpu_hours(preset(name), work, parse_cluster("h100x8", 16))
    assert hours == pytest.approx(HOURS[name] * 128, rel=0.25)


def plan(name="8b", stage="long", cluster="h100x8", nodes=16, *extra):
    cfg = compose([f"recipe={name}", f"stage={stage}", *extra])
    return cfg, search(cfg, preset(name), workload(cfg), parse_cluster(cluster, nodes))


@pytest.mark.parametrize(("name", "stage"), [("4b", "sft"), ("8b", "long"), ("o7b", "long"), ("8b", "pretrain")])
def test_best_layouts_pass_the_checks_of_training(name, stage):
    cfg, found = plan(name, stage)
    for candidate in found.best:
        layout = candidate.layout
        assert candidate.fits(found.cluster)
        assert layout.model_size * layout.data == 128
        trained = compose([f"recipe={name}", f"stage={stage}", *layout.settings.split()])
        problems = [p for p in find_problems(trained, 128) if "data." not in p.split("=")[0]]
        assert problems == []
    seconds = [c.step.seconds for c in found.best]
    assert seconds == sorted(seconds)
    every = candidates(cfg, preset(name), found.work, found.cluster, None)
    assert seconds[0] == min(c.step.seconds for c in every if c.fits(found.cluster))


def test_every_other_layout_has_a_true_reason():
    _, found = plan("8b", "long", "h100x8", 4)
    assert len(found.others) > 5
    for candidate, why in found.others:
        if why.startswith("needs"):
            assert candidate.memory.total > USABLE * 79.2 * GIB
        else:
            assert candidate.step.seconds > found.best[0].step.seconds
            ratio = candidate.step.seconds / found.best[0].step.seconds
            assert why.startswith(f"{ratio - 1:.0%} slower" if ratio < 2 else f"takes {ratio:.1f} times as long")


def test_components_move_as_they_must():
    cfg = compose(["recipe=8b", "stage=long"])
    model, work, cluster = preset("8b"), workload(cfg), parse_cluster("h100x8", 16)

    def step(**kw):
        return step_time(model, cfg.stage, work, cluster, Layout(**kw))

    def need(**kw):
        return memory(model, cfg.stage, work, Layout(**kw), cfg.memory)

    one, eight = need(data=128), need(context=8, ulysses=8, data=16)
    assert eight.decoder == pytest.approx(one.decoder / 8) and eight.vision == pytest.approx(one.vision / 8)
    assert eight.weights == one.weights and eight.optimizer == one.optimizer  # sharded over data x context
    assert need(tensor=2, data=64).gradients < 0.6 * one.gradients
    assert need(data=128, recompute="full").decoder < 0.2 * one.decoder
    blocks = replace(cfg.memory, recompute_vision=True)  # of the encoder alone, also where layers are not recomputed
    assert memory(model, cfg.stage, work, Layout(data=128), blocks).vision < 0.2 * one.vision
    blocks = replace(cfg.memory, recompute_vision=False)
    assert memory(model, cfg.stage, work, Layout(data=128, recompute="full"), blocks).vision == one.vision
    assert step(data=128).recompute == 0 < step(data=128, recompute="selective").recompute
    assert step(data=16, pipeline=8).bubble > step(data=32, pipeline=4).bubble > step(data=128).bubble == 0
    assert step(data=128).imbalance > step(data=64, tensor=2).imbalance  # two micro-batches each can be balanced
    chunks, tiles = (replace(cfg.memory, **{k: v}) for k, v in (("vision_chunk", 8), ("mlp_tiles", 4)))
    plain = step(data=128)
    for options, most in ((chunks, plain.vision), (tiles, plain.linear)):
        recompute = step_time(model, cfg.stage, work, cluster, Layout(data=128), options=options).recompute
        assert 0.2 * most < recompute < 0.34 * most  # one pass more than the three
    lora = step_time(model, replace(cfg.stage, lora=LoraConfig(rank=8)), work, cluster, Layout(data=128))
    assert lora.linear == pytest.approx(plain.linear * 2 / 3) and lora.flops.linear == plain.flops.linear * 2 / 3
    slow, usual, fast = (
        step_time(model, cfg.stage, work, cluster, Layout(data=128), EFFICIENCIES[name])
        for name in ("flex", "flash2", "flash3")
    )
    assert fast.attention < 0.5 * slow.attention and fast.linear == slow.linear
    assert usual == step(data=128) and fast.attention < usual.attention < slow.attention
    assert step(data=128).flops.total == step(context=8, ulysses=8, data=16).flops.total


def test_layouts_are_those_that_divide():
    cluster, model = parse_cluster("h100x8", 2), preset("8b")
    found = list(layouts(model, cluster, 128, 36864))
    assert len(set(found)) == len(found) > 50
    assert all(x.model_size * x.data == 16 and 128 % (x.data * x.micro_batch) == 0 for x in found)
    assert {x.context // x.ulysses for x in found if x.context * x.tensor == 16} == {2}
    assert all((x.ring_balance == "cost") == (x.ulysses < x.context) for x in found)
    assert all(("parallel.ring_balance=cost" in x.settings) == (x.ulysses < x.context) for x in found)


def test_averages_between_the_known_lengths():
    assert averages(36864)[2] == averages(80000)[2] == 0.397
    assert averages(100) == averages(2536)
    assert averages(16384)[2] < averages(26000)[2] < averages(36864)[2]


def test_what_cannot_fit_is_refused_with_what_would():
    with pytest.raises(UserError, match=r"does not fit on 1 node of 1 L40S.* needs \d+ GiB per GPU .*has 44.*nodes="):
        plan("8b", "long", "l40sx1", 1)
    with pytest.raises(UserError, match="No number of nodes"):
        plan("8b", "long", "l40sx1", 1, "data.packing.sequence_length=9437184", "stage.global_batch_size=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster=h100"], "expected GPU and number per node"),
        (["cluster=h100x8", "nodes=many"], "nodes=many: expected a whole number"),
        (["cluster=h300x8"], "no GPU 'h300'; did you mean"),
        (["nodes=0"], "at least one"),
        (["cluster=h100x8", "cluster=a100x4"], "cluster=h100x8 cluster=a100x4: a plan is for one cluster"),
        (["nodes=1", "nodes=1"], "name each of cluster= and nodes= once"),
        (["memory.vision_chunk=99999999999999999999"], "must be at least 1 and at most 2147483647"),
        (["memory.mlp_tiles=1000000"], "memory.mlp_tiles=1000000: a pack has only 36864 tokens to slice"),
        (["--area", "3"], "expected a share"),
        (["nodes=3"], "no layout of the 8b model divides 128 packs"),
        (["cluster.nodes=4"], "cluster.nodes=4: a plan's hardware is set with cluster=h100x8 nodes=N"),
        (["data.packing.sequence_length=0"], "data.packing.sequence_length=0: must be at least 1"),
        (["data.packing.sequence_length=-100"], "data.packing.sequence_length=-100: must be at least 1"),
        (["data.packing.sequence_length=99999"], "more than the 36864 positions of the 8b model"),
        (["data.packing.max_crops=0"], "but a pack holds data.packing.max_crops=0"),
        (["stage.global_batch_size=0"], "stage.global_batch_size=0: must be at least 1"),
        (["stage.micro_batch_size=0"], "stage.micro_batch_size=0: must be at least 1"),
        (["stage.max_steps=0"], "stage.max_steps=0: must be at least 1"),
        (["stage.max_steps=-5"], "stage.max_steps=-5: must be at least 1"),
        (["memory.vision_chunk=0"], "memory.vision_chunk=0: must be at least 1"),
        (["memory.mlp_tiles=0"], "memory.mlp_tiles=0: must be at least 1"),
        (["memory.loss_chunk=0"], "memory.loss_chunk=0: must be at least 1"),
        (["parallel.tensor=0"], "parallel.tensor=0: must be at least 1"),
        (["parallel.tensor=3"], "parallel.tensor=3 does not divide the 32 query heads"),
        (["parallel.context_ulysses=3"], "parallel.context_ulysses=3 does not divide parallel.context=8"),
        (["stage.max_steps=0", "memory.mlp_tiles=0"], "2 settings cannot work"),
    ],
)
def test_bad_input(capsys, arguments, message):
    assert main(["plan", "recipe=8b", "stage=long", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe=4b", "stage=sft", "scale=gpu_lora", "cluster=h100x1"],
        ["recipe=4b", "stage=long_context", "scale=gpu", "cluster=h200x1", "stage.max_steps=70", "init_from=a b"],
        ["recipe=8b", "stage=long", "cluster=h100x8", "nodes=16"],
        ["recipe=8b", "stage=long", "cluster=h200x4", "nodes=2", "parallel=ulysses8", "stage.optim.llm.lr=3e-6"],
        ["recipe=o7b", "stage=sft", "cluster=h100x8", "parallel.context=8", "parallel.context_ulysses=4"]
        + ["parallel.tensor=1", "parallel.sequence=false", "parallel.cp_comm_type=all_gather"],
        ["recipe=8b", "stage=sft", "cluster=h100x8", "nodes=4", "memory.recompute=full", "memory.recompute_layers=4"],
        ["recipe=8b", "stage=long", "cluster=h100x8", "memory.recompute=full", "memory.sequence_chunk=2048"],
        ["recipe=4b", "stage=long", "scale=gpu", "cluster=h100x1"],
        ["recipe=8b", "stage=sft", "cluster=h100x8", "cluster.slurm.partition=big", "stage.micro_batch_size=64"],
        ["recipe=8b", "stage=long", "cluster=h100x8", "nodes=2", "model.attention=flex", "memory.vision_chunk=16"],
        ["recipe=tiny", "stage=pretrain", "cluster=h100x2"],
    ],
    ids=" ".join,
)
def test_printed_command_is_the_planned_run(capsys, arguments):
    """What is printed, read by a shell and composed: the user's settings, on the plan's processes, in its layout."""
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    words = shlex.split(out.split("to train with this plan:")[1].split("\n\n")[0].replace("\\\n", " "))
    assert words[:2] == ["molmo2", "train"]
    hardware = dict(a.split("=") for a in arguments if a.startswith(("cluster=", "nodes=")))
    cluster = parse_cluster(hardware["cluster"], int(hardware.get("nodes", 1)))
    asked = compose([a for a in arguments if not a.startswith(("cluster=", "nodes="))])
    run = compose(words[2:])
    assert wanted_processes(run) == cluster.gpus
    assert run.cluster.kind == ("slurm" if cluster.nodes > 1 or "slurm" in " ".join(arguments) else "local")
    assert run.cluster.slurm.partition == asked.cluster.slurm.partition and run.cluster.precision == "bf16"
    assert list(find_problems(run, files=False)) == []
    assert replace(run.stage, micro_batch_size=1) == replace(asked.stage, micro_batch_size=1)
    for part in ("model", "data", "init_from", "output_dir", "save_every"):
        assert getattr(run, part) == getattr(asked, part)
    assert run.memory.vision_chunk == asked.memory.vision_chunk
    model = preset(run.model.preset)
    best = search(asked, model, workload(asked), cluster).best[0]
    assert configured(run, model, workload(run), cluster) == best


@pytest.mark.parametrize("device", DEVICES)
def test_libraries_are_refused_on_gpus_they_are_not_for(capsys, device):
    """As training on such a GPU refuses them."""
    hopper, blackwell = "h" in device, "b" in device
    for library, runs in (("fa2", True), ("fa3", hopper), ("fa4", hopper or blackwell), ("cudnn", hopper or blackwell)):
        code = main(["plan", "recipe=tiny", "stage=sft", f"cluster={device}x1", f"kernels.flash={library}"])
        said = capsys.readouterr().err
        assert code == (0 if runs else 2), said
        assert runs or f"kernels.flash={library}: " in said and f"{device.upper()} is " in said and "h100" in said
    assert main(["plan", "recipe=tiny", "stage=sft", f"cluster={device}x1", "--kernel", "flash3"]) == 2 * (not hopper)


def test_what_a_gpu_cannot_do_is_refused_at_once(capsys):
    asked = ["cluster.precision=fp8", "kernels.flash=fa3"]
    assert main(["plan", "recipe=8b", "stage=long", "cluster=a100x8", "nodes=16", *asked]) == 2
    said = capsys.readouterr().err
    assert "cluster.precision=fp8: A100 is older than Hopper" in said
    assert "kernels.flash=fa3: FlashAttention-3 is for Hopper GPUs, A100 is Ampere" in said


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["memory.offload=true"], "memory.offload=true is planned with memory.recompute=full, not with none"),
        (["memory.recompute=full", "memory.recompute_layers=4"], "memory.recompute_layers=4 is not planned with"),
        (
            ["memory.recompute=selective", "memory.recompute_modules=[core_attn]"],
            "memory.recompute_modules=[core_attn]",
        ),
        (["parallel.distributed_optimizer=false"], "parallel.distributed_optimizer=false is not planned with"),
        (["parallel=ulysses8", "cluster=h100x4"], "one replica of parallel.* takes 8 GPUs, which do not divide 4"),
        (["stage.micro_batch_size=96"], "1 replica with stage.micro_batch_size=96 does not divide stage."),
        ([], None),
    ],
    ids=str,
)
def test_the_row_as_set_is_there_or_its_absence_explained(capsys, asked, why):
    hardware = [] if any(a.startswith("cluster=") for a in asked) else ["cluster=h100x8"]
    words = ["plan", "recipe=8b", "scale=node", "stage=sft", *hardware, *asked]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["configured"] is None) == (found["not_configured"] is not None) == (why is not None)
    assert main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        (out.count("(as set)") == 1 and re.search(r"no row \(as set\): [^:]*", out)[0].count(why))
        if why
        else ("(as set) " in out and "no row" not in out)
    )


def test_what_is_set_otherwise_than_asked_is_named(capsys):
    """And nothing else: what the user did not write, or got as asked, is not."""
    words = ["plan", "recipe=4b", "scale=gpu", "stage=long", "cluster=h200x1", "memory.offload=true"]
    assert main([*words, "memory.recompute=full", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["remarks"] == ["set otherwise than you asked: memory.offload=false, not true"]
    assert "memory.offload=false" in found["command"] and found["configured"]["host_gib"] > 0
    assert main([*words[:-1], "parallel=ulysses8", "--json"]) == 0
    (said, *_) = [r for r in json.loads(capsys.readouterr().out)["remarks"] if "otherwise" in r]
    assert "parallel.context=1, not 8" in said and "memory" not in said and "stage" not in said
    assert main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "A plan chooses parallel.*, stage.micro_batch_size, memory.recompute," in out and "all else is as set" in out


@pytest.mark.parametrize(
    ("words", "cluster"), [("4b sft gpu_lora", "l40sx1"), ("4b sft gpu", "h200x1"), ("o7b long node", "h100x8")]
)
def test_offload_is_taken_where_it_gains_more_than_a_hundredth(words, cluster):
    """Against every layout: none of these would be without it if the fastest were taken."""
    name, stage, scale = words.split()
    cfg, found = plan(name, stage, cluster, 1, f"scale={scale}")
    every = [c for c in candidates(cfg, preset(name), found.work, found.cluster, None) if c.fits(found.cluster)]
    passed_over = 0
    for best in found.best:
        x = best.layout
        same = [
            c
            for c in every
            if (c.layout.tensor, c.layout.context, c.layout.pipeline) == (x.tensor, x.context, x.pipeline)
        ]
        fastest = min(same, key=lambda c: c.step.seconds)
        plain = min((c.step.seconds for c in same if not c.layout.offload), default=float("inf"))
        assert x.offload == (plain > 1.01 * fastest.step.seconds)
        assert best.step.seconds == (fastest.step.seconds if x.offload else plain)
        passed_over += fastest.layout.offload and not x.offload
    assert passed_over


def test_the_optimizer_goes_to_the_host_where_nothing_else_fits(capsys):
    """Stage 3 of the 4B on one H100: 6 bytes a trained parameter on the GPU, 16 on the host."""
    cfg, found = plan("4b", "long", "h100x1", 1, "scale=gpu")
    best, plain = found.best[0], replace(found.best[0].layout, optimizer_offload=False)
    assert best.layout.optimizer_offload and best.memory.optimizer == 0
    assert best.memory.gradients / 4 == pytest.approx(best.memory.host_optimizer / 16)
    other = weigh(cfg, preset("4b"), found.work, found.cluster, plain, None)
    assert not other.fits(found.cluster) and other.memory.host_optimizer == 0
    assert other.memory.optimizer / 12 == pytest.approx(best.memory.gradients / 4)
    assert 0 < best.step.host == pytest.approx(best.step.seconds - other.step.seconds)
    assert not any(c.fits(found.cluster) for c in candidates(cfg, preset("4b"), found.work, found.cluster, None))
    assert main(["plan", "recipe=4b", "stage=long", "scale=gpu", "cluster=h100x1"]) == 0
    out = capsys.readouterr().out
    assert "memory.optimizer_offload=true" in out and "optimizer on the host: 65.2 GB of host memory a GPU" in out
    roomy = plan("4b", "long", "h200x1", 1, "scale=gpu")[1]
    assert not any(c.layout.optimizer_offload for c in roomy.best)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "long"])
def test_without_a_cluster_the_plan_is_for_the_scales_own_gpus(capsys, stage):
    for scale, cluster in (("gpu", "1 H200"), ("gpu_lora", "1 H100"), ("node", "8 H100"), ("published", "8 H100")):
        assert main(["plan", "recipe=4b", f"scale={scale}", f"stage={stage}", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["cluster"] == f"1 node of {cluster}"
        assert found["remarks"][0].startswith(f"no cluster= was given: 1 node of {cluster} was taken")
        assert scale == "published" or found["configured"]["fits"]


def test_numbers_that_a_pack_never_reaches_are_remarked(capsys):
    asked = ["memory.vision_chunk=384", "memory.loss_chunk=100000000", "kernels.norm=plain"]
    assert main(["plan", "recipe=8b", "stage=long", "cluster=h100x8", "nodes=16", *asked, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["remarks"]
    assert [s.split(" ")[0] for s in said] == ["memory.vision_chunk=384", "memory.loss_chunk=100000000", "kernels.*"]
    asked = ["memory.vision_chunk=383", "memory.loss_chunk=36863", "kernels.flash=fa3"]
    assert main(["plan", "recipe=8b", "stage=long", "cluster=h100x8", "nodes=16", *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["remarks"] == []


WORDS = [
    ["recipe=4b", "scale=gpu_lora", "stage=sft"],
    ["recipe=4b", "scale=gpu", "stage=long", "memory.offload=true", "memory.vision_chunk=null"],
    ["recipe=8b", "stage=long", "parallel=ulysses8", "memory.recompute=selective"],
    ["recipe=8b", "cluster=gpu", "stage=sft", "cluster.precision=fp8", "stage.max_steps=7", "kernels=plain"],
    ["recipe=o7b", "scale=node", "stage=pretrain", "data.packing.sequence_length=5072", "stage.name=mine"],
    ["recipe=tiny", "stage=long", "parallel=tp2cp2", "model.attention=blocks"],
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_words_of_a_run_plan_the_same_run(words):
    """What a refusal prints: composed again, every layout takes the same memory and the same time."""
    cfg = compose(words)
    said = plan_words(cfg)
    again = compose([w for w in said if not w.startswith(("cluster=", "nodes="))])
    hardware = dict(w.split("=") for w in said if w.startswith(("cluster=", "nodes=")))
    cluster = parse_cluster(hardware["cluster"], int(hardware.get("nodes", 1)))
    model = preset(cfg.model.preset)
    first, second = (candidates(c, model, workload(c), cluster, None) for c in (cfg, again))
    assert first == second and first
    if "kernels=plain" not in words and "stage.name=mine" not in words:
        assert len(said) <= len(words) + 2


def test_user_configurations_are_named_in_the_command(tmp_path, capsys):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "mine.yaml").write_text("defaults: [sft]\nmax_steps: 7\n")
    short = "data.packing.sequence_length=1024"
    assert main(["plan", "recipe=tiny", "stage=mine", short, "--config-dir", str(tmp_path), "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    assert command[2:7] == ["--config-dir", str(tmp_path), "recipe=tiny", "stage=mine", short]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "arguments", [["recipe=tiny", "stage=long", "cluster=h100x1"], ["recipe=4b", "stage=sft", "cluster=h200x1"]]
)
def test_small_plans_show_nothing_empty(capsys, monkeypatch, arguments, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert "why not" not in out and "inside the node" not in out
    assert not re.search(r"\b0(\.0+)? (B|M|PFLOP|[sm]*/step)", out) and " 0.0 " not in out
    assert all(len(line) <= width for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "kernel"),
    [([], "flash2"), (["model.attention=flex"], "flex"), (["--kernel", "flash3"], "flash3")],
)
def test_attention_is_as_fast_as_the_kernel_of_the_run(capsys, arguments, kernel):
    """Unless another is asked for: what model.attention names, or for auto what training on GPUs picks."""
    assert main(["plan", "recipe=tiny", "stage=long", "cluster=h100x1", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernel"] == kernel
    cfg = compose(["recipe=tiny", "stage=long"])
    work, cluster = workload(cfg), parse_cluster("h100x1")
    same = search(cfg, preset("tiny"), work, cluster, EFFICIENCIES[kernel]).best[0]
    assert found["best"][0]["seconds"] == pytest.approx(same.step.seconds)


def test_command(capsys):
    assert main(["plan", "recipe=8b", "stage=long", "cluster=h100x8", "nodes=16"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "attention, by mask area" in out and "Its paper reports 3,328 on 128 H100" in out
    assert main(["plan", "recipe=8b", "stage=long", "cluster=h100x8", "nodes=16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["best"][0]
    assert best["seconds"] == pytest.approx(sum(best["step_seconds"].values()))
    assert sum(best["memory_gib"].values()) < DEVICES["h100"].memory
    assert found["steps"] == found["workload"]["steps"] == 2000 and found["workload"]["length"] == 36864
    parts = found["flops_per_step"]
    assert parts["total"] == pytest.approx(sum(v for k, v in parts.items() if k != "total"))
    modes = found["by_recompute"]
    assert [m["settings"].split("memory.")[1:] for m in modes] == [
        ["recompute=none"],
        ["recompute=selective"],
        ["recompute=full"],
        ["recompute=full ", "recompute_attention=true"],
        ["recompute=full ", "offload=true"],
    ]
    assert best in modes and {m["layout"] for m in modes} == {best["layout"]}
    assert [m["host_gib"] > 0 for m in modes] == [False] * 4 + [True]
    totals = [sum(m["memory_gib"].values()) for m in modes]
    assert totals == sorted(totals, reverse=True)
    assert modes[0]["seconds"] < modes[1]["seconds"] < modes[2]["seconds"] < modes[3]["seconds"]


def test_a_plan_knows_that_features_are_kept(capsys):
    words = ["plan", "recipe=4b", "scale=gpu_lora", "stage=sft", "cluster=h100x1", "--json"]
    kept = ["data.feature_cache.path=/data/kept", "data.feature_cache.max_gib=1024"]

    def planned(*more):
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)

    without, fast, slow = planned(), planned(*kept), planned(*kept, "data.feature_cache.disk_gbs=0.2")
    assert without["first_epoch"] is None and not any("feature_cache" in remark for remark in without["remarks"])
    best, first = fast["best"][0], fast["first_epoch"]
    assert best["seconds"] < first["seconds"] and best["disk_bytes"] > 0 == first["disk_bytes"]
    assert best["step_seconds"]["vision"] < 0.2 * first["step_seconds"]["vision"]
    assert fast["flops_per_step"]["vit"] == 0 < without["flops_per_step"]["vit"]
    (remark,) = (remark for remark in fast["remarks"] if "feature_cache" in remark)
    assert "A crop takes 3.36 MB" in remark and f"holds {2**40 // (729 * 2304 * 2):,}" in remark
    assert slow["best"][0]["step_seconds"]["disk"] > 0
    assert any("does not pay" in remark for remark in slow["remarks"])
