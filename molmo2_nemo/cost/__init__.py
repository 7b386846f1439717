"""What a step computes, sends and takes. No torch here.

flops.py       operations of a pack, component by component
traffic.py     messages and bytes of each kind of parallelism
parameters.py  parameters by component, and which of them a rank holds
workload.py    what an average step is made of
hardware.py    GPUs and clusters by name
efficiency.py  what share of the hardware's figures each kind of work reaches
layout.py      one way to spread a model over GPUs
step.py        seconds of a micro-batch and of a step, from all of these
context.py     seconds of a pack by the number of ranks that share it
"""
