"""Imported checkpoints compute what `transformers` computes: every family, its quirks on, from folders written by `transformers` itself."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings

import pytest
import torch
from public_models import import_folder

from dualbranch import DualBranchConfig, DualBranchModel
from dualbranch.accounting import total_params
from dualbranch.convert import families, huggingface
from dualbranch.layers import rope_frequencies

transformers = pytest.importorskip("transformers", reason="compares with transformers (pip install 'transformers>=5')")

TOLERANCE = 1e-4
SIZES = {"vocab_size": 90, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
MORE = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SHORT, LONG = [1.0, 1.1, 1.3], [1.5, 2.0, 4.0]  # of 6 elements that rotate
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "short_factor": SHORT, "long_factor": LONG}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}
GEMMA = {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 7, "layer_types": [*2 * ["sliding_attention"], "full_attention", "sliding_attention"]}
GEMMA_ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": LINEAR}
EVERY_OTHER = {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}

#: name -> model_type and settings of the family
CASES = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama untied llama3": ("llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama wide heads linear": ("llama", {"head_dim": 20, "rope_parameters": LINEAR}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2 yarn mscale": ("qwen2", {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5, "beta_fast": 8, "beta_slow": 2, "truncate": False}}),
    "qwen2 window from layer 1": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3 yarn attention factor": ("qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "qwen3 window": ("qwen3", {"head_dim": 16, **EVERY_OTHER}),
    "phi3 partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}, "tie_word_embeddings": True}),
    "phi3 longrope short": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "phi3 longrope long": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "phi3 window": ("phi3", {"sliding_window": 11}),
    "gemma3": ("gemma3_text", {**GEMMA, "query_pre_attn_scalar": 16, "rope_parameters": GEMMA_ROPE}),
    "gemma3 scale and caps": ("gemma3_text", {**GEMMA, "query_pre_attn_scalar": 5, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 30.0}),
    "gemma3 untied": ("gemma3_text", {**GEMMA, "tie_word_embeddings": False, "layer_types": None, "sliding_window_pattern": 2}),
}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3", "gemma3_text": "Gemma3Text"}


def make(name: str):
    """A random model of `transformers` with weights so large that every quirk shows in the logits."""
    model_type, settings = CASES[name]
    prefix = CLASSES[model_type]
    config = getattr(transformers, f"{prefix}Config")(**copy.deepcopy(SIZES | MORE | settings), attn_implementation="eager")
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.add_(0.2 * torch.randn_like(p))
            elif key.endswith("bias"):
                p.normal_(std=0.5)
            else:
                p.mul_(6 if "embed" not in key and "lm_head" not in key else 3)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name -> (transformers' model, ours out of the folder it wrote); each made once."""

    @functools.cache
    def get(name: str):
        theirs = make(name)
        folder = tmp_path_factory.mktemp("hf")
        theirs.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "attn_logit_softcapping")
            ours = import_folder(folder, max_seq_len=128 if name.endswith("long") else None)
        return theirs, ours

    return get


def tokens(n_rows: int, n: int) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (n_rows, n), generator=torch.Generator().manual_seed(n))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    difference, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert difference <= TOLERANCE, f"{what}: logits differ by {difference:.1e} (largest {size:.1f})"


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_transformers(name, pair):
    theirs, ours = pair(name)
    t = tokens(2, 50)
    expected = theirs(t).logits
    assert expected.std() > 0.3, "the logits hardly vary; nothing would show"
    assert_same(ours(t).logits, expected, "whole")
    cache, parts = ours.new_cache(2, 50), []
    for start, end in ((0, 30), *((i, i + 1) for i in range(30, 50))):
        parts.append(ours(t[:, start:end], cache=cache).logits)
    assert_same(torch.cat(parts, 1), expected, "prefill and decode")
    assert not ours.training and all(p.dtype == torch.float32 for p in ours.parameters())
    assert total_params(ours.config) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_padded_batches_equal_transformers(name, pair):
    theirs, ours = pair(name)
    t, lengths = tokens(3, 40), torch.tensor([40, 17, 33])
    valid = torch.arange(40) < lengths[:, None]
    t[~valid] = 0
    expected = theirs(t, attention_mask=valid.long(), position_ids=torch.arange(40).expand(3, -1)).logits[valid]
    assert_same(ours(t, lengths=lengths).logits[valid], expected, "right-padded")
    cache = ours.new_cache(3, 41)
    first = ours(t, lengths=lengths, cache=cache).logits[valid]
    assert_same(first, expected, "right-padded into a cache")
    step = ours(tokens(3, 1), cache=cache).logits[:, 0]
    for b, n in enumerate(lengths.tolist()):
        alone = theirs(torch.cat([t[b : b + 1, :n], tokens(3, 1)[b : b + 1]], 1)).logits[:, -1]
        assert_same(step[b : b + 1], alone, f"next token of row {b}")


#: what each case must notice if the importer or the model left it out
QUIRKS = {
    "llama untied llama3": {"rope_scaling": families.RopeScaling()},
    "qwen2 yarn": {"rope_scaling": families.RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=32, attention_factor=1.0)},
    "qwen2 window from layer 1": {"sliding_layers": (), "sliding_window": None},
    "qwen3 window": {"sliding_window": 10},
    "phi3 partial": {"rotary_dim": None},
    "phi3 longrope long": {"max_seq_len": 16},
    "phi3 window": {"sliding_window": 12},
    "gemma3": {"sliding_rope_theta": None},
    "gemma3 scale and caps": {"logit_softcap": None},
    "gemma3 untied": {"embed_scale": 1.0},
}


@pytest.mark.parametrize("name", QUIRKS)
@torch.no_grad()
def test_the_comparison_notices_a_quirk_left_out(name, pair):
    theirs, ours = pair(name)
    wrong = DualBranchModel(dataclasses.replace(ours.config, **QUIRKS[name] | ({} if "max_seq_len" in QUIRKS[name] else {"max_seq_len": 128})))
    wrong.load_state_dict(ours.state_dict())
    if "max_seq_len" in QUIRKS[name]:
        wrong.config = ours.config  # the short factors, for prompts as long as before
    t = tokens(2, 50)
    assert (wrong(t).logits - theirs(t).logits).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_phi_reads_its_fused_tensors_in_the_right_order_and_scale_overrides_apply(pair):
    theirs, ours = pair("phi3 partial")
    qkv = theirs.model.layers[1].self_attn.qkv_proj.weight
    assert torch.equal(torch.cat([ours.blocks[1].slow.w_q.weight, ours.blocks[1].kv.w_k.weight, ours.blocks[1].kv.w_v.weight]), qkv)
    assert pair("gemma3")[1].config.attn_scale is None, "16 ** -0.5 is what attention does anyway"
    assert pair("gemma3 scale and caps")[1].config.attn_scale == pytest.approx(5**-0.5)


def test_longrope_is_imported_for_its_trained_length_unless_asked(tmp_path):
    make("phi3 longrope long").save_pretrained(tmp_path)
    assert import_folder(tmp_path).config.max_seq_len == 16
    with pytest.raises(ValueError, match="129; this model was made for at most 128"):
        import_folder(tmp_path, max_seq_len=129)


@pytest.mark.parametrize("kind", ["llama3", "yarn", "longrope", "linear"])
def test_frequencies_equal_those_of_transformers_at_real_sizes(kind):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    params = {
        "llama3": {**LLAMA3, "rope_theta": 500_000.0, "factor": 32.0, "original_max_position_embeddings": 8192},
        "yarn": {**YARN, "rope_theta": 1_000_000.0, "original_max_position_embeddings": 32_768},
        "longrope": {**LONGROPE, "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)], "partial_rotary_factor": 0.75},
        "linear": LINEAR,
    }[kind]
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
    if kind == "longrope":
        theirs = transformers.Phi3Config(**SIZES | MORE | sizes, rope_parameters=params, original_max_position_embeddings=4096)
    else:
        theirs = transformers.LlamaConfig(**SIZES | MORE | sizes, rope_parameters=params)
    for length in (4096, 131_072) if kind == "longrope" else (131_072,):
        ours = families.config_of(theirs.to_dict(), max_seq_len=length)
        freq, amplitude = rope_frequencies(ours.rotary_dim or ours.head_dim, ours.rope_theta, ours.rope_scaling, ours.max_seq_len)
        expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=length)
        torch.testing.assert_close(freq.float(), expected, rtol=1e-5, atol=0)
        assert amplitude == pytest.approx(factor, rel=1e-9)


@torch.no_grad()
def test_shards_bf16_and_files_of_older_versions_are_read(tmp_path, pair):
    theirs, ours = pair("gemma3")
    t = tokens(1, 30)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(import_folder(tmp_path / "shards").state_dict()["norm.weight"], ours.norm.weight)
    assert torch.equal(import_folder(tmp_path / "shards")(t).logits, ours(t).logits)
    make("gemma3").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32, attn_implementation="eager")
    assert_same(import_folder(tmp_path / "half")(t).logits, half(t).logits, "bf16 weights computed in fp32")
    assert import_folder(tmp_path / "half", torch.bfloat16).dtype == torch.bfloat16
    config, tensors = huggingface.read_folder(tmp_path / "shards")
    new = families.config_of(config)
    for key in ("rope_parameters", "layer_types", "tie_word_embeddings", "query_pre_attn_scalar", "hidden_activation"):
        config.pop(key)
    old = {**config, "rope_theta": 1_000_000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"type": "linear", "factor": 8.0}, "query_pre_attn_scalar": 16}
    assert dataclasses.replace(families.config_of(old | {"sliding_window_pattern": 3}), sliding_layers=new.sliding_layers) == new
    multimodal = {"model_type": "gemma3", "text_config": old | {"sliding_window_pattern": 3}}
    renamed = {name.replace("model.", "language_model.model.", 1): load for name, load in tensors.items()} | {"vision_tower.x": None}
    assert isinstance(families.build(multimodal, renamed), DualBranchModel)


def test_rope_scaling_beside_rope_parameters_is_merged_as_transformers_does():
    sliding, full = {"rope_type": "default", "rope_theta": 1000.0}, {"rope_type": "default", "rope_theta": 2000.0}
    both = {"rope_parameters": {"sliding_attention": sliding, "full_attention": full}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    settings = SIZES | MORE | GEMMA | both
    ours = families.config_of({"model_type": "gemma3_text", **settings})
    assert ours == families.config_of(transformers.Gemma3TextConfig(**copy.deepcopy(settings)).to_dict())
    assert (ours.rope_scaling, ours.rope_theta, ours.sliding_rope_theta) == (families.RopeScaling("linear", 2.0), 2000.0, 1000.0)


def test_a_real_config_of_each_family_is_understood():
    """The numbers of published config.json files, as far as they matter here."""
    sizes = {"vocab_size": 1000, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 24, "num_key_value_heads": 8}
    phi = {"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "sliding_window": 262_144}
    phi |= {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}, "tie_word_embeddings": True}
    c = families.config_of({"model_type": "phi3", **sizes, **phi})
    assert (c.rotary_dim, c.max_seq_len, c.sliding_layers) == (96, 4096, ()) and c.rope_scaling.amplitude == pytest.approx(1.1902, abs=1e-4)
    llama = {"rope_theta": 500_000.0, "max_position_embeddings": 131_072, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}}
    c = families.config_of({"model_type": "llama", **sizes, **llama, "head_dim": None, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}})
    assert (c.head_dim, c.rope_theta, c.rope_scaling.kind, c.tie_embeddings) == (128, 500_000.0, "llama3", False)
    yarn = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}}
    for context, expected in ((32_768, 131_072), (40_960, 131_072), (200_000, 200_000)):  # Qwen2.5's card adds it and leaves the context as it was
        qwen = {"model_type": "qwen2", **sizes, "max_position_embeddings": context, **yarn}
        assert families.config_of(qwen).max_seq_len == expected and families.config_of(qwen, 100_000).max_seq_len == 100_000
    c = families.config_of({"model_type": "gemma3_text", **sizes, "head_dim": 256})
    assert (c.sliding_window, c.sliding_rope_theta, c.rope_theta, c.tie_embeddings, c.activation) == (4096, 1e4, 1e6, True, "geglu")
    assert c.sliding_layers == (0, 1, 2, 3) and c.embed_scale == 3072**0.5 and c.post_norms and c.qk_norm
    assert isinstance(c, DualBranchConfig) and c.is_dense
