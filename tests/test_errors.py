"""Words of what is said to the person at the keyboard."""

from molmo2_nemo.cli.main import main
from molmo2_nemo.errors import plural, sized


def test_a_count_and_its_noun():
    assert [plural(n, "GPU") for n in (0, 1, 2, 1024)] == ["0 GPUs", "1 GPU", "2 GPUs", "1,024 GPUs"]
    assert plural(1, "process starts", "processes start") == "1 process starts"
    assert plural(2, "process", "processes") == "2 processes"


def test_bytes():
    sizes = (0, 1.5 * 2**20, 2**30 - 1, 2**30, 9.96 * 2**30, 3 * 2**40)
    assert [sized(n) for n in sizes] == ["0.0 MiB", "1.5 MiB", "1,024 MiB", "1.0 GiB", "10.0 GiB", "3,072 GiB"]


def test_a_plan_of_one(capsys):
    words = ["recipe=tiny", "stage=sft", "cluster=h100x1", "stage.max_steps=1", "stage.global_batch_size=1"]
    assert main(["plan", *words, "stage.micro_batch_size=1"]) == 0
    out = capsys.readouterr().out
    assert " 1 pack per step, 1 step\n" in out and " on 1 GPU with the first" in out
