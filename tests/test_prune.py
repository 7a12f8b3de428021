"""Pruning takes what matters least, leaves groups whole, meets its target as accounted, and repairs in closed form what it can."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dualbranch import DualBranchConfig, DualBranchModel
from dualbranch.accounting import total_params
from dualbranch.convert import families
from dualbranch.convert.prune import choose_sizes, measure, prune
from dualbranch.data.packing import Rows, pack
from dualbranch.precision import quantize
from kernels import SparseSpec

SIZES = {"d_model": 48, "n_layers": 4, "n_stem": 4, "n_heads": 6, "n_kv_heads": 3, "head_dim": 8, "d_ff": 64, "fast_n_heads": 3, "fast_d_ff": 16}
CONFIG = DualBranchConfig(vocab_size=64, sparse=SparseSpec(8, 2, 16, 2, 64), **SIZES)
GEMMA = {"post_norms": True, "qk_norm": True, "activation": "geglu", "embed_scale": 48**0.5, "sliding_layers": (0, 2), "sliding_window": 9}
GEMMA |= {"sliding_rope_theta": 100.0}


def random_model(config: DualBranchConfig = CONFIG, seed: int = 0) -> DualBranchModel:
    model = DualBranchModel(config).eval()
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.embed.weight.mul_(40)
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def rows_of(seq_len: int) -> Rows:
    """The same 16 documents of 40 tokens, one a row; the rest of the row is padding."""
    generator = torch.Generator().manual_seed(0)
    return pack([(torch.randint(1, 64, (40,), generator=generator).tolist(), [0.0] + [1.0] * 39) for _ in range(16)], seq_len, 8, 0)


@pytest.fixture(scope="module")
def rows():
    return rows_of(48)


@torch.no_grad()
def distance(a: DualBranchModel, b: DualBranchModel, rows) -> float:
    """Mean square of the difference of logits of real tokens, as a share of b's variance."""
    x, y = (m(rows.tokens, doc_start=rows.doc_start).logits[rows.real] for m in (a, b))
    return float((x - y).square().mean() / y.var())


@torch.no_grad()
def kill(model: DualBranchModel, channels=(), groups=(), neurons=(), layers=()) -> None:
    """Plants parts that do nothing: channels that nobody writes, heads, neurons and layers that write nothing."""
    dead = list(channels)
    model.embed.weight[:, dead] = 0
    for i, block in enumerate(model.blocks):
        w_o, w_down = block.slow.w_o.weight, block.slow.ff.w_down.weight
        w_o[dead] = w_down[dead] = 0
        for g in groups:
            w_o[:, g * 16 : (g + 1) * 16] = 0  # both heads of the group
        w_down[:, list(neurons)] = 0
        if i in layers:
            w_o.zero_()
            w_down.zero_()


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_embeddings": False}, {"qk_norm": True}, GEMMA])
def test_planted_dead_parts_go_first_and_the_function_stays(rows, changes, refit):
    model = random_model(dataclasses.replace(CONFIG, **changes))
    kill(model, channels=range(5, 17), groups=[1], neurons=range(8, 40), layers=[2])
    small, report = prune(model, rows, None, n_layers=3, d_model=36, n_kv_heads=2, d_ff=32, refit=refit)
    assert report["layers"]["kept"] == [0, 1, 3]
    assert report["channels"]["kept"] == [*range(5), *range(17, 48)] and report["channels"]["share_kept"] == pytest.approx(1)
    assert all(h["groups_kept"] == [0, 2] and h["kept"] == [0, 1, 4, 5] for h in report["heads"])
    assert torch.equal(small.blocks[2].kv.w_k.weight, model.blocks[3].kv.w_k.weight[[*range(8), *range(16, 24)]][:, report["channels"]["kept"]])
    assert small.config.sliding_layers == ((0,) if changes is GEMMA else ())
    difference = distance(small, model, rows)
    assert difference < (1e-4 if refit else 1e-9), f"{difference:.1e} of the variance of the logits"


def test_pruning_to_the_whole_is_the_identity(rows):
    for changes in ({}, GEMMA):
        model = random_model(dataclasses.replace(CONFIG, **changes))
        small, report = prune(model, rows, 1.0)
        assert not families.differences(model.config, small.config) and report["share"] == 1
        assert all(torch.equal(x, small.state_dict()[name]) for name, x in model.state_dict().items())
        assert small.embed.weight.data_ptr() != model.embed.weight.data_ptr()


def test_packed_models_are_refused(rows):
    with pytest.raises(ValueError, match="packed at int8; prune the one it was quantized from"):
        prune(quantize(random_model(), "int8"), rows)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.35, 0.2])
@torch.no_grad()
def test_the_target_is_met_as_accounted_and_the_model_is_cheaper(rows, share):
    model = random_model()
    small, report = prune(model, rows, share)
    n = sum(p.numel() for p in small.parameters())
    limit = share * sum(p.numel() for p in model.parameters())
    assert n == total_params(small.config) == report["after"]["params"] and 0.85 * limit < n <= limit, f"{n} parameters for a limit of {limit:.0f}"
    whole, cheap = model.cost(n_cached=100), small.cost(n_cached=100)
    assert cheap.flops < (share + 0.2) * whole.flops and cheap.params_read < whole.params_read and cheap.kv_bytes <= whole.kv_bytes
    out = small(rows.tokens, doc_start=rows.doc_start).logits
    assert out.isfinite().all() and out.std() > 0.1 and small.config.is_dense and not small.training
    assert json.loads(json.dumps(report)) == report


@torch.no_grad()
def test_permuting_neurons_and_channels_leaves_the_pruned_function_unchanged(rows):
    model, other = random_model(), random_model()
    generator = torch.Generator().manual_seed(3)
    e = torch.randperm(48, generator=generator)
    other.embed.weight.copy_(other.embed.weight[:, e])
    other.norm.weight.copy_(other.norm.weight[e])
    for block in other.blocks:
        f = torch.randperm(64, generator=generator)
        slow, ff = block.slow, block.slow.ff
        for norm in (block.attn_norm, slow.ff_norm):
            norm.weight.copy_(norm.weight[e])
        for linear in (slow.w_q, block.kv.w_k, block.kv.w_v):
            linear.weight.copy_(linear.weight[:, e])
        slow.w_o.weight.copy_(slow.w_o.weight[e])
        ff.w_act.weight.copy_(ff.w_act.weight[f][:, e])
        ff.w_up.weight.copy_(ff.w_up.weight[f][:, e])
        ff.w_down.weight.copy_(ff.w_down.weight[e][:, f])
    assert distance(other, model, rows) < 1e-9
    a, b = (prune(m, rows, 0.5)[0] for m in (model, other))
    assert distance(a, b, rows) < 1e-6


def test_the_refit_is_nearer_than_the_cut_and_the_important_half_than_the_other(rows):
    model = random_model()
    sizes = {"d_ff": 32, "n_kv_heads": 2, "n_layers": 3}
    refitted, cut = (distance(prune(model, rows, None, **sizes, refit=r)[0], model, rows) for r in (True, False))
    assert refitted < 0.7 * cut, f"refitted {refitted:.3f}, cut {cut:.3f}"
    importance = measure(model, rows)
    worst = random_model()
    with torch.no_grad():  # keeps the neurons that matter least instead
        for i, block in enumerate(worst.blocks):
            block.slow.ff.w_down.weight[:, importance.neurons[i].topk(32).indices] = 0
    best = distance(prune(model, rows, None, d_ff=32, refit=False)[0], model, rows)
    assert best < distance(worst, model, rows)


def test_groups_stay_whole_and_fewer_heads_per_group_can_be_asked_for(rows):
    model = random_model()
    _, report = prune(model, rows, 0.4)
    for h in report["heads"]:
        assert h["kept"] == [2 * g + m for g in h["groups_kept"] for m in (0, 1)]
    small, report = prune(model, rows, None, n_heads=3)
    assert small.config.n_kv_heads == 3 and all([k // 2 for k in h["kept"]] == [0, 1, 2] for h in report["heads"])
    with pytest.raises(ValueError, match="n_heads is 4; it must be n_kv_heads = 3 times at most 2"):
        prune(model, rows, None, n_heads=4)
    one_group = choose_sizes(dataclasses.replace(CONFIG, n_kv_heads=1, fast_n_heads=2), 0.4)
    assert one_group.n_kv_heads == 1 and one_group.n_heads < 6


@pytest.mark.parametrize("changes", [{}, GEMMA])
def test_padding_is_no_calibration_text(changes):
    model, few, many = random_model(dataclasses.replace(CONFIG, **changes)), rows_of(40), rows_of(72)
    a, b = (measure(model, rows) for rows in (few, many))
    for f in dataclasses.fields(a):
        torch.testing.assert_close(getattr(a, f.name), getattr(b, f.name), msg=lambda text, name=f.name: f"importance of {name}: {text}")
    assert distance(*(prune(model, rows, 0.5)[0] for rows in (few, many)), few) < 1e-6
    with pytest.raises(ValueError, match=r"rows hold 40 tokens, fewer than the 60 inputs"):
        prune(model, many.map(lambda x: x[:1]), None, d_ff=60)


def test_the_slow_branch_of_a_dual_model_is_what_is_pruned(rows):
    model = random_model(dataclasses.replace(CONFIG, n_stem=1))
    small, report = prune(model, rows, 0.5)
    slow = total_params(CONFIG)
    assert small.config.is_dense and report["before"]["params"] == slow and report["after"]["params"] <= 0.5 * slow


def test_what_is_pruned_can_still_be_exported_as_a_family(rows):
    for changes, family in (({}, "llama"), ({"qkv_bias": True}, "qwen2"), (GEMMA, "gemma3_text")):
        small, _ = prune(random_model(dataclasses.replace(CONFIG, **changes)), rows, 0.5)
        assert families.hf_config_of(small.config)["model_type"] == family


@pytest.mark.parametrize("share", [0.9, 0.8, 0.65, 0.5, 0.35, 0.25])
def test_smollm2_comes_near_its_target_with_sizes_that_others_can_read(share):
    config = DualBranchConfig(vocab_size=49_152, d_model=576, n_layers=30, n_stem=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536, fast_n_heads=3)
    small = choose_sizes(config, share)
    reached = total_params(small) / total_params(config)
    assert 0.95 * share < reached <= share, f"{reached:.3f} with {small.n_layers} layers, {small.d_model} wide, {small.n_heads} heads, {small.d_ff} neurons"
    assert small.d_ff % 32 == small.d_model % small.n_heads == 0 and small.n_heads == 3 * small.n_kv_heads
    assert (small.d_model == config.d_model) == (share > 0.3), "width goes last, when the embedding would leave too little to the layers"
    if share == 0.5:
        given = choose_sizes(config, share, n_layers=30, n_kv_heads=3, d_ff=1536)
        assert given.d_model < config.d_model and total_params(given) <= share * total_params(config), "or when all else is given"


def test_the_command_prunes_on_the_users_text_and_reports(tmp_path, capsys):
    import public_models

    from dualbranch import load
    from dualbranch.checkpoint import save_checkpoint
    from dualbranch.cli import main

    tok = public_models.tokenizer_of("smollm2")
    save_checkpoint(tmp_path / "m", random_model(dataclasses.replace(CONFIG, vocab_size=tok.vocab_size)), tok)
    (tmp_path / "t.txt").write_text("the user is in the inn, you see: 12 + 34.\n" * 60)
    args = ["prune", str(tmp_path / "m"), "--out", str(tmp_path / "p"), "--text", str(tmp_path / "t.txt"), "--rows", "6", "--seq-len", "64"]
    assert main([*args, "--share", "0.6", "--layers", "3"]) == 0
    assert "layers kept" in capsys.readouterr().out
    report, small = json.loads((tmp_path / "p" / "pruning.json").read_text()), load(tmp_path / "p").model
    assert small.config.n_layers == 3 and report["after"]["params"] == sum(p.numel() for p in small.parameters()) and report["share"] <= 0.6
    assert main([*args, "--share", "0.6"]) == 2 and "exists already" in capsys.readouterr().err


def test_what_cannot_be_had_is_named(rows):
    model = random_model()
    for kwargs, words in (
        ({"target_share": 0.001}, "target_share is 0.001: .* smallest model"), ({"target_share": 1.5}, r"target_share is 1.5; it must lie in \(0, 1\]"),
        ({"target_share": None, "d_ff": 65}, r"d_ff is 65; it must be an integer in \[1, 64\]"), ({"target_share": None, "n_layers": 0}, "n_layers is 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            prune(model, rows, **kwargs)
    with torch.no_grad():
        model.embed.weight[3] = float("nan")
    with pytest.raises(ValueError, match="isn't finite"):
        prune(model, rows, 0.5)
