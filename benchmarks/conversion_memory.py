"""Peak memory of a conversion: ours, tensor by tensor, against loading everything and saving it.

    python benchmarks/conversion_memory.py [--gib 2.0] [--output benchmarks/results/conversion_memory_DATE.md]

A synthetic Qwen3-like Molmo2 of at least `--gib` GiB in bfloat16 (random weights, native format, several shards) is
written to a temporary folder. Import and export then run in child processes of their own, each in both ways:

    ours    molmo2_nemo.convert
    plain   safetensors.torch.load_file of every shard, all tensors renamed and fused with the same rules, then saved
            (import: torch.save; export: torch.load, split, safetensors.torch.save_file)

Reported is the growth of the peak resident set (VmHWM in /proc/self/status) over what the process had after its
imports. Pages of memory-mapped files are counted while they are mapped, the page cache of read() and write() is not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

GIB = 2**30
STEPS = ("import", "export")
WAYS = ("ours", "plain")


def model_config(gib: float) -> Any:
    """A Molmo2 with the published vision encoder and vocabulary, deep enough to fill `gib` GiB in bfloat16."""
    from molmo2_nemo.convert.names import external_shapes
    from molmo2_nemo.model.config import preset

    base = preset("8b")
    text = replace(base.text, hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=64, ffn_size=3072)
    for layers in range(4, 400, 4):
        connector = replace(base.connector, ffn_size=3072)
        config = replace(base, name="custom", connector=connector, text=replace(text, num_layers=layers))
        if 2 * sum(math.prod(shape) for shape in external_shapes(config, "native").values()) >= gib * GIB:
            return config
    raise ValueError(f"{gib} GiB is more than this benchmark's model can be")


def write_source(folder: Path, gib: float) -> None:
    """The synthetic model as a Hugging Face folder, written a tensor at a time."""
    import torch

    from molmo2_nemo.convert.hf_config import config_json
    from molmo2_nemo.convert.names import external_shapes
    from molmo2_nemo.convert.safetensors_io import SafetensorsWriter

    config = model_config(gib)
    shapes = external_shapes(config, "native")
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(folder, shapes, dict.fromkeys(shapes, torch.bfloat16), GIB // 2) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape, generator=generator))
    (folder / "config.json").write_text(json.dumps(config_json(config, "native", "bfloat16")))


def plain_import(source: Path, target: Path) -> None:
    """Load the whole model, convert all of it, save all of it."""
    import safetensors.torch
    import torch

    from molmo2_nemo.convert.hf_config import read_model_config
    from molmo2_nemo.convert.names import rules, to_canonical

    config, _ = read_model_config(source)
    tensors: dict[str, Any] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(shard)
    model: dict[str, Any] = {}
    for rule in rules(config, "native"):
        model |= to_canonical(rule, {name: tensors[name] for name in rule.external}, config)
    target.mkdir()
    # a slice of the joined embedding table would drag the whole of it along
    torch.save({name: tensor.clone() for name, tensor in model.items()}, target / "model.pt")
    (target / "config.json").write_text((source / "config.json").read_text())


def plain_export(source: Path, target: Path) -> None:
    """Export what `plain_import` wrote: load all of it, split and rename all of it, save all of it."""
    import safetensors.torch
    import torch

    from molmo2_nemo.convert.hf_config import read_model_config
    from molmo2_nemo.convert.names import rules, to_external

    config, _ = read_model_config(source)
    model = torch.load(source / "model.pt", weights_only=True)
    tensors: dict[str, Any] = {}
    for rule in rules(config, "native"):
        tensors |= to_external(rule, [model[name] for name in rule.canonical], config)
    target.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, target / "model.safetensors")


def memory(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def child(step: str, way: str, source: Path, target: Path) -> None:
    """One conversion; prints seconds, and memory before and at its peak, as JSON."""
    import safetensors.torch  # noqa: F401 - part of the baseline
    import torch

    from molmo2_nemo.convert import export_checkpoint, import_checkpoint

    torch.set_num_threads(1)
    ways: dict[tuple[str, str], Callable[[Path, Path], Any]] = {
        ("import", "ours"): import_checkpoint,
        ("export", "ours"): export_checkpoint,
        ("import", "plain"): plain_import,
        ("export", "plain"): plain_export,
    }
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is the imports'
    before, start = memory("VmRSS"), time.perf_counter()
    ways[step, way](source, target)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "before": before, "peak": memory("VmHWM")}))


def measure(work: Path, gib: float) -> dict[str, Any]:
    """Measures import and export in both ways, on the same source."""
    write_source(work / "source", gib)
    rows: dict[str, dict[str, float]] = {}
    for way in WAYS:
        folders = [work / "source", work / f"{way}-import", work / f"{way}-export"]
        for step, source, target in zip(STEPS, folders[:-1], folders[1:], strict=True):
            command = [sys.executable, __file__, "--child", step, way, str(source), str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{way} {step} failed:\n{done.stderr}")
            rows[f"{step} {way}"] = json.loads(done.stdout.splitlines()[-1])
    return facts(work) | {"rows": rows, "identical": identical(work)}


def facts(work: Path) -> dict[str, Any]:
    """Sizes of the model."""
    from molmo2_nemo.convert.safetensors_io import SafetensorsFolder

    tensors = SafetensorsFolder(work / "source").tensors
    largest = max(tensors, key=lambda name: tensors[name].nbytes)
    return {
        "model": sum(info.nbytes for info in tensors.values()),
        "tensors": len(tensors),
        "largest": tensors[largest].nbytes,
        "largest_name": largest,
    }


def identical(work: Path) -> bool:
    """Whether both ways back gave every bit of the source."""
    import torch

    from molmo2_nemo.convert.safetensors_io import SafetensorsFolder

    source = SafetensorsFolder(work / "source")
    folders = [SafetensorsFolder(work / f"{way}-export") for way in WAYS]
    return all(
        folder.tensors.keys() == source.tensors.keys()
        and all(torch.equal(folder.read(name), source.read(name)) for name in source.tensors)
        for folder in folders
    )


def report(found: dict[str, Any]) -> str:
    """The result file."""
    model, largest = found["model"], found["largest"]
    lines = [
        f"# Peak memory of a conversion, {datetime.date.today()}",
        "",
        "`benchmarks/conversion_memory.py`, which says what is measured and how.",
        "",
        f"- commit {command('git', 'rev-parse', '--short', 'HEAD')}",
        f"- {hardware()}; Linux {platform.release()}, Python {platform.python_version()}, {versions()}",
        f"- model: {model / GIB:.2f} GiB in bfloat16, {found['tensors']} tensors, the largest "
        f"`{found['largest_name']}` of {largest / GIB:.2f} GiB",
        f"- both ways back are bit-identical to the source: {'yes' if found['identical'] else 'NO'}",
        "",
        "| conversion | way | peak over baseline, GiB | of the model | baseline, GiB | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for step in STEPS:
        for way in WAYS:
            row = found["rows"][f"{step} {way}"]
            extra = row["peak"] - row["before"]
            lines.append(
                f"| {step} | {way} | {extra / GIB:.2f} | {extra / model:.0%} | {row['before'] / GIB:.2f} | "
                f"{row['seconds']:.1f} |"
            )
    bound = model + largest
    worst = max(found["rows"][f"{step} ours"]["peak"] - found["rows"][f"{step} ours"]["before"] for step in STEPS)
    lines += [
        "",
        f"The bound, model size + one tensor, is {bound / GIB:.2f} GiB; our worst conversion took "
        f"{worst / GIB:.2f} GiB, {worst / largest:.1f} times the largest tensor, "
        "whatever the number of layers.",
        "",
        "Seconds are of a shared machine with warm page cache: they are no measure of speed.",
    ]
    return "\n".join(lines) + "\n"


def command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() or "unknown"


def hardware() -> str:
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return f"{len(cpu)} cores of {cpu[0] if cpu else 'an unnamed CPU'}, {total / GIB:.0f} GiB of memory"


def versions() -> str:
    import safetensors
    import torch

    return f"torch {torch.__version__}, safetensors {safetensors.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the synthetic model")
    parser.add_argument("--output", type=Path, help="file to write the report to, besides printing it")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], Path(args.child[2]), Path(args.child[3]))
        return
    with tempfile.TemporaryDirectory(prefix="conversion_memory.") as work:
        text = report(measure(Path(work), args.gib))
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)


if __name__ == "__main__":
    main()
