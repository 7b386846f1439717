"""The published training code, predicted by the same cost model: where its time goes, and a check of the model.

Released code and paper, stage 3 on 16 nodes of 8 H100: Ulysses over the node, one pack at a time, whole layers
recomputed, parameters gathered in fp32 for every micro-batch, and attention with a dense S x S bias, which skips
nothing: explicit-mask kernels do 16 and 15 TFLOP/s by mask area on documents of at most a quarter of the sequence
(causal, so an eighth of the square), some 128 and 120 by what they execute. The bias is built and cast in every layer.
"""

from __future__ import annotations

from molmo2_nemo.cost.efficiency import ATTENTION_BACKWARD, Efficiency
from molmo2_nemo.cost.flops import forward_flops
from molmo2_nemo.cost.hardware import DEVICES, Cluster
from molmo2_nemo.cost.parameters import parameters
from molmo2_nemo.cost.workload import Workload
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.model.flops import crop_flops

HOURS = {"4b": 25.3, "o7b": 25.7, "8b": 26.0}  # stage 3, 128 H100, 2,000 steps (paper)
H100 = DEVICES["h100"].tflops
BIAS_FORWARD, BIAS_BACKWARD = 128 / H100, 120 / H100  # shares of the peak, by executed area


def published_step(model_config: Molmo2Config, work: Workload, cluster: Cluster, context: int = 8) -> dict[str, float]:
    """Seconds of one step by component; `context` ranks share a pack and its crops, as in the paper."""
    efficiency, peak = Efficiency(), cluster.device.peak
    packs = work.packs * context / cluster.gpus
    pack = forward_flops(
        model_config, tokens=work.length, pairs=float(work.length) ** 2, scored_tokens=round(work.scored)
    )
    linear = (pack.linear + pack.head) / context / (efficiency.matrix * peak) * packs
    attention = pack.attention / context / peak * packs
    # padding crops are encoded on some paths; the whole budget is counted
    vision = crop_flops(model_config) * work.max_crops / context / (efficiency.vision * peak) * packs
    layers, square = model_config.text.num_layers, float(work.length) ** 2
    cast = 2 * layers * (4 + 2) * square / (cluster.device.memory_gbs * 1e9) * packs  # read fp32, write bf16, twice
    gathered = (
        3 * 4.0 * parameters(model_config).total * packs
    )  # for forward, for backward, and gradients the other way
    exchange = min(
        efficiency.link * cluster.device.link_gbs, efficiency.network * cluster.device.network_gbs * cluster.per_node
    )
    computing = 4 * linear + 4 * vision + attention * (2 / BIAS_FORWARD + ATTENTION_BACKWARD / BIAS_BACKWARD) + cast
    return {
        "linear": 4 * linear,
        "attention": attention * (2 / BIAS_FORWARD + ATTENTION_BACKWARD / BIAS_BACKWARD),
        "vision": 4 * vision,
        "bias": cast,
        "other": efficiency.other * computing,
        "gathering": (1 - efficiency.hidden_gradients) * gathered / (exchange * 1e9),
    }


def published_gpu_hours(model_config: Molmo2Config, work: Workload, cluster: Cluster) -> float:
    return sum(published_step(model_config, work, cluster).values()) * work.steps * cluster.gpus / 3600
