"""Files of the NeMo Framework Launcher are answered with a command of ours; its run has their values."""

from __future__ import annotations

import re
import shlex

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.compose import compose, stages_of
from molmo2_nemo.settings.nemo_launcher import SAME
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import by_dotted_key, load_yaml, to_dict

THEIRS = """\
base_results_dir: /results
run: {name: gpt_5b, results_dir: "${base_results_dir}/${run.name}", time_limit: "1-12:00:00", dependency: singleton}
trainer:
  {num_nodes: 2, devices: 8, accelerator: gpu, precision: bf16, logger: false, max_epochs: null, max_steps: 1000,
   max_time: "05:23:30:00", log_every_n_steps: 10, val_check_interval: 200, gradient_clip_val: 1.0}
exp_manager:
  resume_if_exists: true
  create_tensorboard_logger: true
  checkpoint_callback_params: {every_n_train_steps: 50, save_top_k: 3, monitor: val_loss}
model:
  micro_batch_size: 1
  global_batch_size: 32
  tensor_model_parallel_size: 2
  pipeline_model_parallel_size: 1
  encoder_seq_length: 8192
  num_layers: 24
  optim:
    {name: distributed_fused_adam, lr: 2e-4, weight_decay: 0.1, betas: [0.9, 0.98],
     sched: {name: CosineAnnealing, warmup_steps: 115, min_lr: 2e-5}}
env_vars: {NCCL_IB_HCA: mlx5, NCCL_TOPO_FILE: null}
container_mounts: [null]
"""


def test_its_command_makes_a_run_with_its_values(tmp_path):
    (tmp_path / "gpt_5b.yaml").write_text(THEIRS)
    with pytest.raises(UserError) as refused:
        load_yaml(tmp_path / "gpt_5b.yaml")
    said = str(refused.value)
    command, lost = re.fullmatch(r".* as a command: molmo2 train (.*)\. Without a counterpart: (.*)", said).groups()
    cfg = compose(shlex.split(command))
    assert (cfg.output_dir, cfg.stage.max_steps, cfg.cluster.nodes, cfg.cluster.devices) == (
        "/results/gpt_5b",
        1000,
        2,
        8,
    )
    assert (cfg.stage.micro_batch_size, cfg.stage.global_batch_size, cfg.parallel.tensor) == (1, 32, 2)
    optim = cfg.stage.optim
    assert (optim.llm.lr, optim.llm.warmup_steps, optim.final_lr_fraction, optim.beta2) == (2e-4, 115, 0.1, 0.98)
    assert (cfg.save_every, cfg.checkpoint.keep_last, cfg.validation.every) == (50, 3, 200)
    assert (cfg.cluster.precision, cfg.cluster.slurm.time, cfg.data.packing.sequence_length) == (
        "bf16",
        "1-12:00:00",
        8192,
    )
    assert cfg.cluster.slurm.env == {"NCCL_IB_HCA": "mlx5"}
    assert [key.split(" ")[0] for key in lost.split(", ")] == [
        *("base_results_dir", "trainer.max_time", "exp_manager.checkpoint_callback_params.monitor"),
        *("model.num_layers", "model.optim.name", "model.optim.sched.name"),
    ]


def test_every_counterpart_is_a_setting():
    known = by_dotted_key(to_dict(RunConfig()))
    assert {key for key in SAME.values() if key not in known} == set()


def test_its_list_of_stages(tmp_path):
    (tmp_path / "launch.yaml").write_text("stages: [data_preparation, training, conversion]\ncluster_type: bcm\n")
    wanted = "data_preparation: molmo2 prepare; training: the stages pretrain, sft and long; conversion: molmo2 convert"
    with pytest.raises(UserError, match=wanted):
        compose([], tmp_path, "launch")
    with pytest.raises(
        UserError, match="training of the NeMo Framework Launcher is the stages pretrain, sft and long here"
    ):
        stages_of(["recipe=tiny", "stages=[training]"])


def test_an_unknown_precision_is_not_guessed(tmp_path):
    (tmp_path / "other.yaml").write_text("trainer: {precision: 16, max_steps: 3}\n")
    wanted = r"stage.max_steps=3\. Without a counterpart: trainer.precision \(nearest: cluster.precision\)"
    with pytest.raises(UserError, match=wanted):
        load_yaml(tmp_path / "other.yaml")
