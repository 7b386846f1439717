"""What training needs, whoever runs the loop: no NeMo, no Lightning. A host (nemo/) calls it; docs/code.md says when.

data.py           packs for this rank, and the loader's state over all ranks
model.py          the stage's model, built and frozen
step.py           a step's micro-batches: to the device, and their losses added up
overlap.py        gradients and parameters sent beside computation
fsdp.py           parameters sharded by Megatron-FSDP, and their checkpoints
ahead.py          micro-batches made ready one ahead, in a thread
gradients.py      sums into gradients of the global batch
groups.py  lr_schedule.py  optimizer.py    groups, their rates, clipping and the update
faults.py         steps that must not be taken
seeds.py          random states of a step
step_result.py  step_statistics.py  metrics/  step_log.py    what a step produced and held, and the log
prometheus.py     the last step as a file for Prometheus' node exporter
step_clock.py     what of a step a rank did by itself
validation.py     loss on held-out data
checkpoints.py    manifests, damage, what is kept
signals.py  stopping.py    a signal to one rank ends the run on all
watchdog.py  whereabouts.py      a run that hangs is ended, and says who did not come
stage.py          attempt.json and the summary
precision.py      FP8: Megatron's settings, and what it needs
dynamic_context.py         what packs are weighed for
profile.py  kernel_kinds.py    some steps under PyTorch's profiler
"""
