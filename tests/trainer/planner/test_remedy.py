from __future__ import annotations

from trainer.config import Config, load
from trainer.gemma3 import SIZES
from trainer.planner import ours, remedy
from trainer.planner.budget import budget
from trainer.planner.cards import CARDS, PINNED_BYTES, card

SIZE = SIZES["12b"]
T4 = CARDS["T4"].memory_bytes


def stock(*overrides: str) -> Config:
    return load("gemma3-12b-t4", ["kernels.layer=stock", *overrides])


def with_ours(*overrides: str) -> Config:
    """The 12B at its preset with nothing kept."""
    nothing = ["kernels.layer=ours", "kernels.keep_bytes=0", "kernels.keep_pinned_bytes=0", "export.num_ctx=65536"]
    return load("gemma3-12b-t4", [*nothing, *overrides])


def test_every_setting_that_is_offered_makes_the_run_fit() -> None:
    available = CARDS["T4"].memory_bytes
    ways = remedy.remedies(stock(), SIZE, available)
    assert ways
    for way in ways:
        cfg = stock(way.setting)
        assert budget(cfg, SIZE).needed_bytes == way.needed_bytes
        assert way.needed_bytes <= card(cfg.plan).memory_bytes


def test_the_setting_of_the_largest_movable_term_comes_first() -> None:
    cfg = stock()
    found = remedy.largest_movable(cfg, budget(cfg, SIZE))
    assert (found.term, found.setting) == ("attention scores", "data.max_tokens")
    ways = [way.setting for way in remedy.remedies(cfg, SIZE, T4)]
    assert ways[:2] == ["kernels.layer=ours", "data.max_tokens=2304"]


def test_the_context_offered_is_the_longest_that_fits() -> None:
    available = CARDS["T4"].memory_bytes
    cfg = stock()
    offered = dict(way.setting.split("=") for way in remedy.remedies(cfg, SIZE, available))
    longest = int(offered["data.max_tokens"])
    longer = remedy.with_setting(cfg, "data", max_tokens=longest + remedy.TOKENS_STEP)
    assert budget(longer, SIZE).needed_bytes > available


def test_nothing_is_offered_where_nothing_helps() -> None:
    assert remedy.remedies(stock("plan.vram_gb=4"), SIZE, 4_000_000_000) == []


def test_a_machine_without_a_card_is_not_offered_one() -> None:
    ways = remedy.remedies(load("gemma3-270m-cpu", ["train.batch_records=1"]), SIZES["270m"], 10**9)
    assert not [way for way in ways if way.setting.startswith("plan.card")]


def test_our_layer_is_offered_only_where_unsloth_loads_the_model() -> None:
    cfg = stock('model.backend="transformers"')
    assert "kernels.layer=ours" not in [way.setting for way in remedy.remedies(cfg, SIZE, T4)]


def test_with_our_layer_what_costs_no_quality_comes_first() -> None:
    cfg = with_ours("data.max_tokens=24576", "kernels.keep_bytes=500_000_000", "train.tokens_per_step=65536")
    assert budget(cfg, SIZE).needed_bytes > T4
    ways = remedy.remedies(cfg, SIZE, T4)
    kinds = [way.setting.partition("=")[0] for way in ways]
    assert kinds[:2] == ["kernels.keep_bytes", "kernels.pin_gradients"]
    assert "data.max_tokens" in kinds[2:]
    for way in ways:
        if not way.setting.startswith("plan."):
            changed = load(
                "gemma3-12b-t4", ["kernels.layer=ours", "kernels.keep_pinned_bytes=0", "export.num_ctx=65536", *kept_but(cfg, way.setting)]
            )
            assert budget(changed, SIZE).needed_bytes == way.needed_bytes <= T4


def kept_but(cfg: Config, setting: str) -> list[str]:
    kept = [f"data.max_tokens={cfg.data.max_tokens}", f"kernels.keep_bytes={cfg.kernels.keep_bytes}"]
    return [*kept, f"train.tokens_per_step={cfg.train.tokens_per_step}", setting]


def test_a_smaller_mlp_tile_is_offered_where_the_mlp_is_the_peak() -> None:
    cfg = with_ours()
    found = budget(cfg, SIZE)
    assert found.moment == "mlp"
    ways = {way.setting: way.needed_bytes for way in remedy.remedies(cfg, SIZE, found.needed_bytes - 1)}
    assert ways["kernels.mlp_tile_tokens=1024"] < found.needed_bytes
    assert list(ways).index("kernels.mlp_tile_tokens=1024") < list(ways).index("data.max_tokens=3840")


def test_every_term_of_our_layer_is_moved_by_a_setting_or_is_as_it_is() -> None:
    fixed = {
        "weights, NF4 codes",
        "weights, block scales",
        "embedding",
        "norms",
        "norm caches",
        "dequantised weights",
        "attention scores",
        "rest",
    }
    around = {"allocator's slack", "CUDA context"}
    for overrides in (
        ["kernels.keep_bytes=2_000_000_000", "kernels.keep_pinned_bytes=2_000_000_000"],
        ["data.max_tokens=16384", "kernels.pin_gradients=true"],
        ["kernels.offload=stock"],
    ):
        terms = set(budget(with_ours(*overrides), SIZE).terms)
        assert terms <= set(remedy.MOVES) | fixed | around


def test_scores_in_blocks_are_not_called_movable() -> None:
    cfg = with_ours("data.max_tokens=16384", "kernels.pin_gradients=true", "adapter.rank=8")
    assert remedy.largest_movable(cfg, budget(cfg, SIZE)).term in {"residuals", "attention's half"}
    assert remedy.largest_movable(with_ours("adapter.rank=256"), budget(with_ours("adapter.rank=256"), SIZE)).setting in {
        "adapter.rank",
        "kernels.pin_gradients",
    }


def test_pinned_memory_is_brought_under_its_limit_without_leaving_the_card() -> None:
    cfg = with_ours("data.max_tokens=20480")
    assert ours.pinned_bytes(cfg, SIZE) > PINNED_BYTES
    ways = remedy.pinned_remedies(cfg, SIZE, PINNED_BYTES, T4)
    assert [way.setting.partition("=")[0] for way in ways] == ["kernels.span_layers", "data.max_tokens"]
    assert all(way.needed_bytes <= PINNED_BYTES for way in ways)
    assert remedy.pinned_remedies(cfg, SIZE, PINNED_BYTES, 14_000_000_000)[0].setting.startswith("data.max_tokens")


def test_the_roomiest_budget_for_kept_tensors_fits_with_its_reserve_and_the_next_does_not() -> None:
    cfg = with_ours()
    most = remedy.roomiest_keep(cfg, SIZE, T4)
    assert 3_000_000_000 < most < 3_500_000_000

    def needed(keep_bytes: int) -> int:
        return budget(remedy.with_setting(cfg, "kernels", keep_bytes=keep_bytes), SIZE).needed_bytes

    assert needed(most) <= T4 - remedy.KEEP_RESERVE < needed(most + remedy.KEEP_STEP)
    assert remedy.roomiest_keep(cfg, SIZE, 10_000_000_000) == 0
    assert remedy.roomiest_keep(stock(), SIZE, 10**12) == 0
