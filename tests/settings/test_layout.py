"""What context parallelism cannot do is said before training, with what to choose instead."""

from __future__ import annotations

import pytest

from molmo2_nemo.model.config import preset
from molmo2_nemo.settings.layout import context_problems, layout_name, layout_of_run
from molmo2_nemo.settings.run import ParallelConfig

NAMES = [
    ({}, "1 process"),
    ({"data": 2}, "DP2"),
    ({"tensor": 2, "sequence": True}, "TP2+SP"),
    ({"tensor": 2, "sequence": True, "context": 2}, "TP2+SP+CP2"),
    ({"tensor": 2, "context": 8, "pipeline": 2, "data": 4}, "TP2+CP8+PP2+DP4"),
    ({"context": 8, "context_ulysses": 8}, "CP8"),
    ({"context": 8, "context_ulysses": 4}, "CP4x2"),
    ({"context": 8, "context_ulysses": 1}, "CP1x8"),
]
DYNAMIC = {"dynamic_context": True, "context_tokens": 18432}


def problems(model="8b", length=36864, attention="auto", **parallel):
    lengths = {"data.packing.sequence_length": length}
    return list(context_problems(ParallelConfig(**parallel), preset(model), lengths, crops=384, attention=attention))


@pytest.mark.parametrize(("settings", "name"), NAMES)
def test_names(settings, name):
    assert layout_of_run(ParallelConfig(**settings)) == name
    sizes = {"ulysses" if key == "context_ulysses" else key: value for key, value in settings.items()}
    assert layout_name(**sizes) == name


def test_the_replicas_that_the_processes_make():
    assert layout_of_run(ParallelConfig(tensor=2, data=1), processes=8) == "TP2+DP4"
    assert layout_of_run(ParallelConfig(context=2, data=4), processes=2) == "CP2"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"context": 8, "length": 36860}, "sequence_length=36860 is not a multiple of context = 8; 36856 is"),
        ({"context": 64, "context_ulysses": 8, "length": 32}, "more ranks than tokens"),
        ({"context": 64}, "set parallel.context_ulysses to one of [1, 2, 4, 8, 16, 32]"),
        ({"tensor": 8, "context": 8}, "the 4 query heads and 1 key/value heads"),
        ({"context": 8, "context_ulysses": 3}, "use one of [1, 2, 4, 8]"),
        ({"context": 8, "context_ulysses": 0}, "does not divide parallel.context=8"),
        ({"context": 3, "length": 36864}, "parallel.context=3 ranks would shard the 32 query heads"),
        ({"context": 8, "context_ulysses": 4, "attention": "flex"}, "context_ulysses=8"),
        ({"dynamic_context": True}, "set parallel.context to the most ranks"),
        ({"context": 8, "dynamic_context": True}, "(static context parallelism gives it 4608 of packs of 36864)"),
        ({"context": 8, "dynamic_context": True, "context_tokens": 4000}, "at least 4608"),
        ({"context": 8, **DYNAMIC, "context_crops": 47}, "packs of 384 crops do not fit on context * tensor = 8 ranks"),
        ({"tensor": 2, "context": 8, **DYNAMIC, "context_crops": 23}, "at least 24"),
        ({"context": 8, **DYNAMIC, "context_crops": 0}, "at least 48"),
        ({"context": 8, "context_crops": 48}, "no effect without parallel.dynamic_context=true"),
    ],
)
def test_what_does_not_work_is_named(settings, expected):
    found = problems(**settings)
    assert len(found) == 1 and expected in found[0], found


@pytest.mark.parametrize(
    "settings",
    [
        {"context": 8},
        {"context": 16},  # 8 key/value heads, each on two ranks
        {"context": 32, "context_ulysses": 8},
        {"context": 6, "context_ulysses": 2},
        {"tensor": 2, "sequence": True, "context": 16, "context_ulysses": 1, "cp_comm_type": "all_gather"},
        {"context": 8, "attention": "flex"},
        {"context": 8, **DYNAMIC},
        {"context": 8, **DYNAMIC, "context_crops": 48},
    ],
)
def test_what_works_is_let_through(settings):
    assert not problems(**settings)


def interleaved_job() -> str:
    """Build the trainer's module under Megatron's virtual pipeline."""
    from megatron.core import parallel_state

    from molmo2_nemo.errors import UserError
    from molmo2_nemo.nemo.module import Molmo2Module

    parallel_state.initialize_model_parallel(1, 2, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(UserError) as error:
        Molmo2Module("tiny").configure_model()
    return str(error.value)


def test_interleaved_pipelines_are_refused(workers):
    for message in workers.run(interleaved_job, ranks=2):
        assert "virtual_pipeline_model_parallel_size=2" in message and "parallel.pipeline" in message
