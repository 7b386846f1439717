"""What a run needs and how long it takes, from its configuration alone: no torch, no GPU, no data.

layouts.py    every way to spread a model over a cluster
memory.py     memory of one GPU, by component
search.py     every layout weighed, the best ones, and why each other one loses
command.py    the command that trains a plan
published.py  the published training code, by the same accounting
table.py      a plan as tables
numbers.py    a plan as plain values
checks.py     settings that no plan can be made of
remarks.py    what was chosen, set otherwise than asked, or has no effect
words.py      a run's settings as words of `molmo2 plan`, and the GPUs they are for

What is weighed comes from cost/: operations, bytes, parameters, hardware, and the time of a step.
"""
