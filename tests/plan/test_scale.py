"""Plans beyond what was ever run: 2M tokens on 256 GPUs, 1M on 8, 1,024 GPUs. Quantities by hand; layouts train."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.cost.efficiency import EFFICIENCIES
from molmo2_nemo.cost.flops import forward_flops, training_flops
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.workload import workload
from molmo2_nemo.model.config import preset
from molmo2_nemo.plan.memory import decoder_activations, memory
from molmo2_nemo.plan.table import scaled
from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.run import ParallelConfig

TOKENS = 2**21
SCALING = ["model.rope_scaling=yarn", "stage.global_batch_size=8", "memory.vision_chunk=16", "--area", "0.5"]
TWO_M = ["model.rope_factor=57", f"data.packing.sequence_length={TOKENS}", "data.packing.max_crops=24576"]
ONE_M = ["model.rope_factor=29", f"data.packing.sequence_length={2**20}", "data.packing.max_crops=12288"]
PLANS = {
    "2M on 256": (["nodes=32", "data.video.max_frames=24576", *TWO_M, *SCALING], 256),
    "1M on 8": (["nodes=1", "data.video.max_frames=12288", *ONE_M, *SCALING], 8),
    "1,024 GPUs": (["nodes=128"], 1024),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_at_scale(capsys, name):
    """Every layout that is shown passes the checks of training; nothing is wider than 80 columns or without units."""
    words, gpus = PLANS[name]
    start = ["plan", "recipe=8b", "stage=long", "cluster=h100x8", *words]
    assert main([*start, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    settings = [w for w in words if not w.startswith(("nodes=", "--")) and w != "0.5"]
    cfg = compose(["recipe=8b", "stage=long", *settings])
    for one in [*found["best"], *found["others"]]:
        sizes = dict(word.split("=") for word in one["settings"].split())
        ranks = {key: int(sizes[f"parallel.{key}"]) for key in ("tensor", "context", "pipeline", "data")}
        assert ranks["tensor"] * ranks["context"] * ranks["pipeline"] * ranks["data"] == gpus
        ulysses = int(sizes.get("parallel.context_ulysses", ranks["context"]))
        across = {"context_ulysses": ulysses, "sequence": ranks["tensor"] > 1}
        cfg.parallel = replace(ParallelConfig(), **ranks, **across)  # type: ignore[arg-type]
        cfg.stage.micro_batch_size = int(sizes["stage.micro_batch_size"])
        problems = [p for p in find_problems(cfg, gpus, files=False) if "data." not in p.split("=")[0]]
        assert problems == [], one["layout"]
    best = found["best"][0]
    assert best["fits"] and 0 < best["mfu"] < 0.62  # the highest rate that is assumed of anything
    assert best["gpu_hours"] == pytest.approx(best["seconds"] * found["steps"] * gpus / 3600)
    assert main(start) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "nan" not in out and "e+" not in out
    assert "the stage takes " in out and f"on {gpus:,} GPUs" in out
    told = "CP4x2: 4 ranks split a pack by heads (Ulysses)"
    assert (told in out) == bool(re.search(r"CP\d+x\d", out.replace(told, "")))
    counted = "have not been counted" in " ".join(out.split())
    assert counted == (name != "1,024 GPUs")  # what is assumed of packs that nobody has seen is said


def test_bytes_of_parameters_and_optimizer_by_hand():
    """8B on 256 context ranks: weights in bf16, gradients in fp32, 12 bytes of optimizer state over 256 ranks."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    rows, extra = 151936 * 4096, 128 * 4096
    block = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    vit = 25 * block + 588 * 1152 + 1152 + 729 * 1152
    connector = 3 * (2304 + 1) * 1152 + 1152 * 1152 + 1152 + 12288 * (2 * 1152 + 4096)
    everything = 36 * layer + 4096 + 2 * rows + extra + vit + connector
    cfg = compose(["recipe=8b", "stage=long", *TWO_M, *SCALING[:2], "data.video.max_frames=24576"])
    layout = Layout(context=256, ulysses=8, recompute="full")
    found = memory(preset("8b"), cfg.stage, workload(cfg, 0.5), layout, cfg.memory, cfg.kernels)
    trained = everything - rows  # the base rows are frozen
    assert found.weights == 2 * everything
    assert (found.gradients, found.optimizer) == (4 * trained, 12 * trained / 256)


def test_activation_bytes_of_a_token_by_hand():
    """8B, whole layers recomputed, bf16: of each of 36 layers the input (4,096 values), attention's output (32 heads of
    128) and its log-sum-exp (fp32, one per head); three more inputs at the ends."""
    token = 36 * (2 * 4096 + 2 * 32 * 128 + 4 * 32) + 3 * 2 * 4096
    found = decoder_activations(preset("8b"), Layout(context=256, ulysses=8, recompute="full"), 8192, dropout=False)
    assert found.waiting == 8192 * token == 8192 * 619_008


def test_attention_operations_by_hand():
    """8B at 2M tokens, half of S x S: two products of 2 * 128 operations per pair and head, 32 heads, 36 layers, and
    twice that backward."""
    pairs = TOKENS * TOKENS // 2
    found = forward_flops(preset("8b"), tokens=TOKENS, pairs=pairs)
    assert found.attention == 2 * 2 * 128 * pairs * 32 * 36 == 36 * 2**55
    assert training_flops(found).attention == 3 * 36 * 2**55
    assert scaled(8 * training_flops(found).attention) == "31.1 E"


def test_what_would_fit_names_settings_before_nodes(capsys):
    words = ["plan", "recipe=8b", "stage=long", "cluster=h100x8", "data.video.max_frames=12288", *ONE_M, *SCALING]
    words.remove("memory.vision_chunk=16")
    assert main(words) == 2
    assert "memory.vision_chunk=16, or nodes=4 would do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"matrixx": 0.5}, "matrixx: no such rate; did you mean 'matrix'?"),
        ({"matrix": 1.5}, "matrix=1.5: expected a share, above 0 and at most 1"),
        ({"matrix": 0}, "matrix=0: expected a share"),
        ({"latency": -1}, "latency=-1: expected a number of at least 0"),
        ({"vision": "fast"}, "vision=fast: expected a share"),
        ([], "expected a JSON object"),
    ],
)
def test_rates_that_cannot_be(tmp_path, capsys, rates, message):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(rates))
    assert main(["plan", "recipe=8b", "stage=long", "cluster=h100x8", "--rates", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"--rates {file}" in error and message in error


def test_measured_rates_take_the_place_of_assumed_ones(tmp_path, capsys):
    file, words = tmp_path / "rates.json", ["plan", "recipe=8b", "stage=long", "cluster=h100x8", "nodes=16"]
    file.write_text(json.dumps({"source": "a card of ours", "attention_forward": 0.7, "attention_backward": 0.54}))
    found = {}
    for name, more in (("assumed", []), ("measured", ["--rates", str(file)])):
        assert main([*words, *more, "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["measured"]["rates"] == vars(EFFICIENCIES["flash2"]) | {
        "attention_forward": 0.7,
        "attention_backward": 0.54,
    }
    one, other = ({c["settings"]: c for c in found[n]["by_recompute"] + found[n]["best"]} for n in found)
    for layout in set(one) & set(other):  # twice as fast
        half = one[layout]["step_seconds"]["attention"] / 2
        assert other[layout]["step_seconds"]["attention"] == pytest.approx(half)
    assert set(one) & set(other)
    assert main([*words, "--rates", str(file)]) == 0
    assert "those of a card of ours as measured" in capsys.readouterr().out
