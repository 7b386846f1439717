"""GPUs by name, for predictions and for the utilisation that a run logs, and clusters: `h100x8` is nodes of eight H100.

Figures are the manufacturers', from data sheets, none measured here: dense bf16 and FP8 rate, memory, memory bandwidth,
and the bandwidth of links in one direction per GPU (of PCIe where GPUs are linked in pairs at most). Networks differ
from site to site: 400 Gb/s per GPU is the usual build with H100 and later.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from molmo2_nemo.errors import UserError, nearest


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    tflops: float  # dense bf16, 1e12 operations per second
    memory: float  # GiB
    memory_gbs: float  # GB/s of its memory
    link_gbs: float  # GB/s to the others of its node, one direction
    network_gbs: float  # GB/s to other nodes, one direction, its share of the node's
    torch_name: str  # part of what torch calls it
    capability: int  # major compute capability
    fp8_tflops: float | None = None  # dense FP8; None: older than Hopper (training/precision.py)

    @property
    def peak(self) -> float:
        """Dense bf16 operations per second."""
        return self.tflops * 1e12

    @property
    def fp8_peak(self) -> float:
        """Dense FP8 operations per second, or bf16 where there is no FP8."""
        return (self.fp8_tflops or self.tflops) * 1e12


DEVICES = {
    d.name: d
    for d in (
        Device("a10", 125, 22.0, 600, 32, 12.5, "A10", 8),
        Device("a100", 312, 79.2, 2039, 300, 25, "A100", 8),
        Device("a800", 312, 79.2, 2039, 200, 25, "A800", 8),
        Device("h20", 148, 95.0, 4000, 450, 50, "H20", 9, 296),
        Device("h100", 989, 79.2, 3350, 450, 50, "H100", 9, 1979),
        Device("h100pcie", 756, 79.2, 2039, 64, 50, "H100 PCIe", 9, 1513),
        Device("h100nvl", 835, 93.0, 3938, 64, 50, "H100 NVL", 9, 1671),
        Device("h200", 989, 139.8, 4800, 450, 50, "H200", 9, 1979),
        Device("gh200", 989, 95.0, 4000, 450, 50, "GH200", 9, 1979),
        Device("b200", 2250, 178.4, 8000, 900, 50, "B200", 10, 4500),
        Device("gb200", 2500, 184.0, 8000, 900, 50, "GB200", 10, 5000),
        Device("l40s", 362, 44.4, 864, 28, 12.5, "L40S", 8),
    )
}


def device_called(torch_name: str) -> Device | None:
    """The GPU that torch calls so (`torch.cuda.get_device_name()`); None where it is not in the table."""
    known = [device for device in DEVICES.values() if device.torch_name in torch_name]
    return max(known, key=lambda device: len(device.torch_name), default=None)  # "H100 PCIe" before "H100"


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """MFU: operations that the model needs (cost/flops.py) over what the hardware could have done in the time.

    Args:
        peak: operations per second of all GPUs together.
    """
    return flops / (seconds * peak)


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs."""

    device: Device
    per_node: int
    nodes: int

    @property
    def gpus(self) -> int:
        return self.per_node * self.nodes

    @property
    def peak(self) -> float:
        """Dense bf16 operations per second of all GPUs."""
        return self.gpus * self.device.peak

    def __str__(self) -> str:
        nodes = f"{self.nodes} node{'s' * (self.nodes > 1)} of "
        return f"{nodes}{self.per_node} {self.device.name.upper()}"

    def with_nodes(self, nodes: int) -> Cluster:
        return replace(self, nodes=nodes)


def parse_cluster(name: str, nodes: int = 1) -> Cluster:
    """`h100x8` and a number of nodes.

    Raises:
        UserError: not of that form, or an unknown GPU.
    """
    match = re.fullmatch(r"([a-z0-9]+?)x(\d+)", name.lower())
    if match is None:
        raise UserError(f"cluster={name}: expected GPU and number per node, such as h100x8")
    if match[1] not in DEVICES:
        raise UserError(f"cluster={name}: no GPU {match[1]!r}; {nearest(match[1], DEVICES)}")
    if int(match[2]) < 1 or nodes < 1:
        raise UserError(f"cluster={name} nodes={nodes}: there must be at least one GPU and one node")
    return Cluster(DEVICES[match[1]], int(match[2]), nodes)
