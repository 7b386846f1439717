"""What a run needs and how long it takes, from its configuration alone: no torch, no GPU, no data.

workload.py   what a step is made of: tokens, mask area, crops
hardware.py   clusters by name
layout.py     one way to spread a model over a cluster
sizes.py      parameters, by component and rank
memory.py     memory of one GPU, by component
rates.py      what share of peak each kind of work reaches
speed.py      time of one step, by component
search.py     every layout, the best ones, and why each other one loses
command.py    the command that trains a plan
published.py  the published training code, by the same accounting
"""
