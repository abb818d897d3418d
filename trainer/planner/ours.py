"""The moments of a step with our own layer (kernels.layer = "ours"), and what it pins in the host's memory.

Between two layers only a float32 residual [T, h] is alive; each span of `span_layers` layers leaves its input behind, 16 bit with
a scale a row, in pinned memory, and is computed again in its backward. Moments that exclude each other:

    mlp         backward of one layer's MLP, a tile of tokens at a time
    attention   backward of one layer's attention, a block of scores at a time
    loss        LOSS_ROWS rows of logits, the final hidden states and their gradient
    optimizer   the gradients back on the card, where kernels.pin_gradients moved them away

Going back through the layers, gradients take the place of what was kept: with one pass a step the highest layer is the one where kept
tensors of the layers before it and gradients of those behind it are most together. With several passes a step the gradients of the
earlier ones stand through all of the later ones, and a layer's new ones come on top.

Counted from shapes. The legend stands in standing.py; t = min(T, kernels.mlp_tile_tokens); b the bytes of a value in model.dtype.
What is too small to count one by one (cuBLAS workspaces, rope's tables, the adapter's columns beside an activation, one layer's A and B
in 16 bit) is REST, what an H100 had beyond the sum of the others at 4,096 and at 24,576 tokens; the other rows of
bench/results/qdora_step.jsonl are its test, and the slack's (tests/trainer/planner/test_ours.py says which row is which). Not counted: what kernels.norms or
kernels.geglu = "stock" hold beyond ours: these switches are for measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trainer.config import Config
from trainer.gemma3 import Size
from trainer.planner import keep, stock
from trainer.planner.standing import LOSS_ROWS, accumulates, adapter, gradients_bytes, narrow_bytes, num_trainable, tokens, weights

SCORE_BLOCK_BYTES = 256 * 2**20
"""Most that the attention's backward holds of scores and their gradients at once."""
SCORE_BYTES = 12
"""S and dP in float32, P and dS in 16 bit, a score."""
REST_BYTES, REST_BYTES_A_TOKEN = 175_000_000, 3_750
GRADIENT_LAYERS = 2
"""Layers whose gradients are on the card at once where they are pinned: one in the making, one on its way."""
SLACK_RESIDUALS, SLACK_KEPT, SLACK_BYTES = 0.71, 0.125, 20_000_000
"""Reserved but unused, with expandable segments, as the trainer asks for them: as a share of the residuals (0.69 at 4,096 tokens, 0.71
at 24,576 in spans of two), as one of the kept tensors, and a page or so."""
FROM_PINNED = ("down", "o", "gate_up")
"""Outputs that lie beside what the MLP's backward needs anyhow when they come back from pinned memory: the others take the place of what a
recompute would have made."""


def standing(cfg: Config, size: Size) -> dict[str, int]:
    """Weights, adapter and optimizer state; its gradients come and go with the moments.

    DoRA's norm caches: n, |W|^2 and g = m / n in float32, 12 bytes a magnitude.
    """
    terms = {**weights(cfg, size), **adapter(cfg, size), "norm caches": 3 * 4 * num_trainable(cfg, size)[1]}
    del terms["gradients"]
    return terms


def moments(cfg: Config, size: Size) -> dict[str, Mapping[str, int]]:
    """Bytes a term of each moment; they exclude each other."""
    rest = REST_BYTES + REST_BYTES_A_TOKEN * tokens(cfg) if cfg.model.device == "cuda" else 0
    backward = {**waiting(cfg, size), "residuals": residuals_bytes(cfg, size), "attention's half": half_bytes(cfg, size), "rest": rest}
    found: dict[str, Mapping[str, int]] = {
        "mlp": backward | mlp_moment(cfg, size),
        "attention": backward | attention_moment(cfg, size) | next_input(cfg, size),
        "loss": {**before_backward(cfg, size), "logits and loss": loss_bytes(cfg, size)},
    }
    return found | ({"optimizer": {"gradients, back for the step": gradients_bytes(cfg, size)}} if _pins_gradients(cfg) else {})


def slack_bytes(moment: Mapping[str, int]) -> int:
    """What the allocator holds beyond what is asked of it."""
    return SLACK_BYTES + round(SLACK_RESIDUALS * moment.get("residuals", 0) + SLACK_KEPT * moment.get("kept tensors", 0))


def pinned(cfg: Config, size: Size) -> dict[str, int]:
    """Bytes a term in the host's pinned memory, as they are asked for. Stock code pins nothing that is ours to plan.

    layer inputs: 2 T h a span. kept tensors: keep.py. gradients: float32, of the whole adapter.
    """
    if not _is_pinning(cfg):
        return {}
    terms = {
        "layer inputs": num_spans(cfg, size) * 2 * tokens(cfg) * size.hidden_size if cfg.kernels.offload == "ours" else 0,
        "kept tensors": keep.kept_bytes(size, tokens(cfg), cfg.adapter.rank, kept(cfg, size), "pinned"),
        "gradients": gradients_bytes(cfg, size) if cfg.kernels.pin_gradients else 0,
    }
    return {name: num for name, num in terms.items() if num}


def pinned_bytes(cfg: Config, size: Size) -> int:
    return sum(pinned(cfg, size).values())


def kept(cfg: Config, size: Size) -> keep.Kept:
    """What the config's budgets keep; nothing in the stock layer, and nothing in pinned memory where kernels.offload = "stock"."""
    if cfg.kernels.layer == "stock":
        return {}
    pinned_bytes = cfg.kernels.keep_pinned_bytes if cfg.kernels.offload == "ours" else 0
    return keep.kept(size, tokens(cfg), cfg.adapter.rank, cfg.kernels.keep_bytes, pinned_bytes)


def num_spans(cfg: Config, size: Size) -> int:
    return math.ceil(size.num_layers / cfg.kernels.span_layers)


def waiting(cfg: Config, size: Size) -> dict[str, int]:
    """What waits on the card while one layer's backward runs, at the layer where it is most.

    layer inputs: 4 T h of each span not yet gone through, without offload. kept tensors: those of the card, of the layers not yet gone
    through. kept tensors, back: of the layer's own, from pinned memory. gradients: float32, of the layers gone through and of this one;
    with several passes a step all of them, and this layer's new ones; where they are pinned those of GRADIENT_LAYERS.
    """
    made, found = keep.outputs(size, tokens(cfg), cfg.adapter.rank), kept(cfg, size)
    every, row, total = cfg.kernels.span_layers, tokens(cfg) * size.hidden_size, gradients_bytes(cfg, size)
    each, on_card, highest = total // size.num_layers, 0, dict[str, int]()
    for layer in range(size.num_layers):
        here = found.get(layer, {})
        on_card += sum(made[name].num_bytes for name, where in here.items() if where == "card" or not _is_pinning(cfg))
        back = sum(made[name].num_bytes for name, where in here.items() if where == "pinned" and name in FROM_PINNED)
        gradients = total + each if accumulates(cfg) else total - layer * each
        terms = {
            "layer inputs": (layer // every + 1) * 4 * row if _keeps_inputs(cfg) else 0,
            "kept tensors": on_card,
            "kept tensors, back": back if _is_pinning(cfg) else 0,
            "gradients": GRADIENT_LAYERS * each if _pins_gradients(cfg) else gradients,
        }
        highest = max(highest, terms, key=lambda one: sum(one.values()))
    return highest


def before_backward(cfg: Config, size: Size) -> dict[str, int]:
    """What waits on the card at the end of the forward pass: as in `waiting`, of all layers; gradients of earlier passes, if there are any."""
    found = kept(cfg, size)
    places: tuple[keep.Where, ...] = ("card",) if _is_pinning(cfg) else ("card", "pinned")
    gradients = 0 if _pins_gradients(cfg) or not accumulates(cfg) else gradients_bytes(cfg, size)
    return {
        "layer inputs": num_spans(cfg, size) * 4 * tokens(cfg) * size.hidden_size if _keeps_inputs(cfg) else 0,
        "kept tensors": sum(keep.kept_bytes(size, tokens(cfg), cfg.adapter.rank, found, where) for where in places),
        "gradients": gradients,
    }


def next_input(cfg: Config, size: Size) -> dict[str, int]:
    """The input of the span before, 2 T h, which comes back while the attention works: at the MLP's peak there is no room for it."""
    pins = _is_pinning(cfg) and cfg.kernels.offload == "ours"
    return {"layer input, on its way": 2 * tokens(cfg) * size.hidden_size} if pins else {}


def residuals_bytes(cfg: Config, size: Size) -> int:
    """Float32 [T, h]: the layer's input x, x1 between attention and MLP, and the gradient dx: 12 T h; 4 T h for each further layer of a span."""
    return (12 + 4 * (cfg.kernels.span_layers - 1)) * tokens(cfg) * size.hidden_size


def half_bytes(cfg: Config, size: Size) -> int:
    """What the attention's backward needs and the MLP's finds there: normed input and o_proj's output 2 b T h; q|k|v, and the same normed
    and turned, 2 b T (q + 2 kv); the output b T q and its logsumexp 4 T heads."""
    b, q, kv = narrow_bytes(cfg), size.query_size, size.kv_size
    return tokens(cfg) * (b * (2 * size.hidden_size + 2 * (q + 2 * kv) + q) + 4 * size.num_heads)


def mlp_moment(cfg: Config, size: Size) -> dict[str, int]:
    """input: normed, b T h. tile: gate|up 2 b t i, whose gradient takes their place, and their product b t i; output and its gradient
    2 b t h. dequantised: gate|up and down, 3 b h i."""
    b, i, h = narrow_bytes(cfg), size.intermediate_size, size.hidden_size
    tile = min(tokens(cfg), cfg.kernels.mlp_tile_tokens)
    norms = stock.dora_norm_bytes(cfg, size) if cfg.kernels.dora == "stock" else 0
    return {
        "MLP input": b * tokens(cfg) * h,
        "MLP tile": b * tile * (3 * i + 2 * h),
        "dequantised weights": b * 3 * h * i,
        "DoRA's norms in PEFT": norms,
    }


def attention_moment(cfg: Config, size: Size) -> dict[str, int]:
    """Tensors and scores of one layer's backward; no weight is dequantised at the same time.

    tensors: the output's gradient, that laid out by heads, and dq 3 b T q; dk and dv summed in float32 8 T kv. scores: a block, or
    the MATH kernel's matrices with kernels.attention = "stock".
    """
    b, num, q, kv = narrow_bytes(cfg), tokens(cfg), size.query_size, size.kv_size
    tensors = num * (b * 3 * q + 2 * 4 * kv)
    scores = min(SCORE_BLOCK_BYTES, SCORE_BYTES * size.num_heads * num * num)
    if cfg.kernels.attention == "stock":
        scores = stock.SCORES_ALIVE * stock.scores_bytes(cfg, size)
    return {"attention tensors": tensors, "attention scores": scores}


def loss_bytes(cfg: Config, size: Size) -> int:
    """Final hidden states and their gradient 2 b T h, the float32 residual 4 T h; of LOSS_ROWS rows (all T with kernels.loss = "stock")
    logits in float32 and in both directions in 16 bit, 8 V a row."""
    b = narrow_bytes(cfg)
    rows = LOSS_ROWS if cfg.kernels.loss == "ours" else tokens(cfg)
    return (2 * b + 4) * tokens(cfg) * size.hidden_size + rows * size.vocab_size * (4 if b == 4 else 8)


def _is_pinning(cfg: Config) -> bool:
    return cfg.kernels.layer == "ours" and cfg.model.device == "cuda"


def _keeps_inputs(cfg: Config) -> bool:
    """Layer inputs stay where they were made; a CPU has no other memory."""
    return not _is_pinning(cfg) or cfg.kernels.offload == "stock"


def _pins_gradients(cfg: Config) -> bool:
    return _is_pinning(cfg) and cfg.kernels.pin_gradients
