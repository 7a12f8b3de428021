"""What the evaluation claims: problems, scores, costs, routing policies, ablations, speed and memory."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_model

from dualbranch import evaluate as evaluation
from dualbranch import routing_study as study
from dualbranch.chat import render_prompt
from dualbranch.data.problem import LANGS, LEVELS, TASKS, split_of, verify
from dualbranch.distill import stages
from dualbranch.distill.config import DataConfig, EvaluationConfig, RunConfig
from dualbranch.evaluate import draw_problems, evaluate, held_out_texts, leaks_reasoning, run_evaluation, wilson
from dualbranch.generate import generate_batch
from dualbranch.measure import measure_memory, measure_speed, speed_cases
from dualbranch.modes import resolve
from dualbranch.sampling import SamplingParams
from kernels import SparseSpec

PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def config(tiny) -> RunConfig:
    model, _ = tiny
    small = EvaluationConfig(n_problems=6, n_shifted=2, budgets=(0.0, 0.3, 1.0), routing_rows=3, max_tokens=12)
    return RunConfig(name="tiny", model=model.config, data=DataConfig(seq_len=256, tasks=("arithmetic", "function_call")), evaluation=small)


@pytest.fixture(scope="module")
def rows(config, tiny):
    return stages.source(config, tiny[1], "valid", purpose=5).batch(0, n_rows=3)


@pytest.fixture(scope="module")
def table(tiny, rows) -> study.TokenTable:
    with torch.inference_mode():
        return study.token_table(tiny[0], rows)


def without_timings(value):
    """A copy without what may differ between two runs."""
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if k not in ("seconds_per_problem", "about", "speed", "memory")}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


# ---- problems


def test_problems_are_the_same_for_the_same_seed_and_spread_over_levels_and_languages(config):
    problems = draw_problems(config, ["arithmetic"])
    assert problems == draw_problems(config, ["arithmetic"]) != draw_problems(replace(config, seed=1), ["arithmetic"])
    assert sorted((p.level, p.lang) for p in problems) == sorted((v, g) for v in LEVELS for g in LANGS)
    assert all(split_of(p.key) == "test" for p in problems)
    assert len({p.prompt for p in problems}) == len(problems)


def test_tasks_default_to_the_configs_and_then_to_all(config):
    assert {p.task for p in draw_problems(config)} == {"arithmetic", "function_call"}
    assert {p.task for p in draw_problems(replace(config, data=DataConfig()))} == set(TASKS)


def test_a_task_named_twice_is_trained_on_more_and_evaluated_once(config):
    twice = replace(config, data=replace(config.data, tasks=("arithmetic", "sorting", "arithmetic")))
    assert draw_problems(twice) == draw_problems(config, ["arithmetic", "sorting"])


def test_held_out_text_is_the_users_apart_from_what_the_teacher_wrote_and_no_file_is_lost(config, tmp_path):
    c = replace(config, out=str(tmp_path), evaluation=replace(config.evaluation, text=(str(tmp_path / "a" / "t.txt"), str(tmp_path / "b" / "t.txt"))))
    notes, written = tmp_path / "notes.jsonl", c.self_text_folder / "00000.jsonl"
    for path, word in ((notes, "note"), (written, "sample"), (tmp_path / "a" / "t.txt", "first"), (tmp_path / "b" / "t.txt", "second")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(200)) if path.suffix == ".jsonl" else word)
    c = replace(c, data=replace(c.data, text=(str(notes), str(c.self_text_folder)), text_share=1.0))
    found = held_out_texts(c)
    assert {name: {t.split()[0] for t in texts} for name, texts in found.items()} == {
        "held-out text": {"note"}, "text the teacher wrote": {"sample"}, c.evaluation.text[0]: {"first"}, c.evaluation.text[1]: {"second"},
    }  # fmt: skip


def test_shifted_problems_come_only_from_tasks_that_know_the_shift(config):
    problems = draw_problems(config, shift="numerals")
    assert [(p.task, p.shift) for p in problems] == [("arithmetic", "numerals")] * 2


# ---- scores and costs


def test_wilson_interval_matches_published_values_and_stays_inside_zero_and_one():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert all(0.0 <= low <= k / n <= high <= 1.0 for n in range(1, 80) for k in (0, 1, n // 2, n) for low, high in [wilson(k, n)])
    assert wilson(0, 0) == (0.0, 1.0)


def test_result_is_what_an_independent_count_over_the_replies_gives(tiny, config):
    model, tok = tiny
    problems = draw_problems(config)
    r = evaluate(model, tok, problems, "auto", PARAMS, batch_size=5)
    replies = generate_batch(model, tok, [render_prompt(tok, [{"role": "user", "content": p.prompt}]) for p in problems], "auto", PARAMS)
    assert r.overall.accuracy == sum(verify(p, g.answer) for p, g in zip(problems, replies, strict=True)) / len(problems)
    assert r.overall.flops == pytest.approx(sum(g.flops for g in replies) / len(replies))
    assert r.overall.tokens == sum(len(g.ids) for g in replies) / len(replies)
    assert r.overall.think_tokens == sum(g.n_think for g in replies) / len(replies)
    assert r.overall.slow_share == sum(map(sum, (g.use_slow for g in replies))) / sum(len(g.use_slow) for g in replies)
    assert r.batch_size == 5 and r.seconds_per_problem > 0


def test_accuracy_is_counted_in_the_group_it_belongs_to(tiny, config, monkeypatch):
    model, tok = tiny
    problems = draw_problems(config)
    (template,) = generate_batch(model, tok, [[tok.bos_id]], "fast", PARAMS)

    def right_on_hard(_model, _tok, prompts, *_):
        return [replace(template, reply=replace(template.reply, answer=p.answer if p.level == "hard" else "?")) for p, _ in zip(problems, prompts, strict=True)]

    monkeypatch.setattr(evaluation, "generate_batch", right_on_hard)
    r = evaluate(model, tok, problems, "fast", PARAMS)
    assert {level: s.accuracy for level, s in r.groups["level"].items()} == {"easy": 0.0, "medium": 0.0, "hard": 1.0}
    assert r.overall.accuracy == pytest.approx(1 / 3)
    assert r.groups["task/level"]["function_call/hard"].accuracy == 1.0
    assert {x["correct"] for x in r.examples} == {True, False}


def test_fast_spends_less_than_think_on_equally_many_tokens_and_reasons_never(tiny, config):
    model, tok = tiny
    problems = draw_problems(config, ["arithmetic"])
    fast, think = (evaluate(model, tok, problems, m, PARAMS) for m in ("fast", "think"))
    assert fast.overall.slow_share == 0.0 and think.overall.slow_share == 1.0
    assert fast.overall.flops / fast.overall.tokens < think.overall.flops / think.overall.tokens
    assert fast.overall.thought_share == fast.overall.think_tokens == fast.leaked_share == 0.0
    assert think.overall.thought_share == 1.0 and think.leaked_share is None


def test_leaked_reasoning_is_noticed_as_tokens_and_as_text(tiny):
    _, tok = tiny
    (clean,) = generate_batch(*tiny, [[tok.bos_id]], "fast", PARAMS)
    assert not leaks_reasoning(tok, clean)
    assert leaks_reasoning(tok, replace(clean, ids=[*clean.ids, tok.control["</think>"]]))
    assert leaks_reasoning(tok, replace(clean, ids=[tok.control["<think>"], *clean.ids]))
    assert leaks_reasoning(tok, replace(clean, reply=replace(clean.reply, answer="well, </think> 7")))
    assert not leaks_reasoning(SimpleNamespace(control={}), clean)  # a tokenizer without a thinking mode


@pytest.mark.parametrize("name, value", [("n_problems", 0), ("routing_rows", 0), ("text_window", 2)])
def test_an_evaluation_that_would_fail_after_training_is_refused_before(config, name, value):
    with pytest.raises(ValueError, match=rf"evaluation\.{name} is {value}; it must be at least [13]"):
        replace(config, evaluation=replace(config.evaluation, **{name: value}))


def test_evaluating_no_problems_says_which_setting_to_raise(tiny):
    with pytest.raises(ValueError, match="n_problems"):
        evaluate(*tiny, [], "fast", PARAMS)


def test_decision_quality_separates_needed_thinking_from_waste(tiny, config):
    model, tok = tiny
    problems = draw_problems(config, ["arithmetic"])[:4]
    r = evaluate(model, tok, problems, "auto", PARAMS)

    def outcome(correct, thought=(False,) * 4):
        pairs = zip(r.answers, correct, thought, strict=True)
        return replace(r, answers=[replace(a, correct=c, generation=replace(a.generation, thought=t)) for a, c, t in pairs])

    auto = outcome([True, True, False, False], thought=[True, True, False, False])
    d = evaluation.decision_quality(auto, outcome([True, True, True, False]), outcome([False, True, False, False]))["all"]
    assert (d["thought"], d["needed"], d["thought_if_needed"], d["thought_if_direct_right"]) == (0.5, 0.5, 0.5, 1.0)
    assert (d["accuracy"], d["accuracy_thinking"], d["accuracy_direct"], d["either_right"]) == (0.5, 0.75, 0.25, 0.75)


# ---- routing policies


@pytest.mark.parametrize("share", [0.1, 0.37, 0.9])
def test_every_policy_sends_exactly_the_same_number_of_tokens_slow(table, share):
    routes = study.policy_routes(table, table, share, seed=0)
    assert {int(r.sum()) for r in routes.values()} == {round(share * len(table.kl))}
    chosen = {tuple(r.tolist()) for r in routes.values()}
    assert len(chosen) == len(routes), "two policies chose the same tokens"


def test_gate_policy_is_a_threshold_on_g_and_oracle_one_on_kl(table):
    routes = study.policy_routes(table, table, 0.4, seed=0)
    assert table.g[routes["gate"]].max() <= table.g[~routes["gate"]].min()
    assert table.kl[routes["oracle"]].min() >= table.kl[~routes["oracle"]].max()
    reply = routes["reply oracle"] & table.scored
    assert table.kl[reply].min() >= table.kl[table.scored & ~routes["reply oracle"]].max()


def test_a_gate_that_ranks_like_the_oracle_routes_like_it(table):
    routes = study.policy_routes(replace(table, g=-table.kl), table, 0.3, seed=0)
    assert torch.equal(routes["gate"], routes["oracle"])


def test_constant_policy_splits_at_most_one_document(table):
    slow = study.policy_routes(table, table, 0.4, seed=0)["constant"]
    split = [d for d in table.document.unique().tolist() if 0 < slow[table.document == d].double().mean() < 1]
    assert len(split) <= 1


def test_position_policy_knows_nothing_of_the_rows_it_routes_but_positions(table):
    other = replace(table, kl=table.kl.flip(0), g=table.g.flip(0))
    assert torch.equal(study.position_score(table, table), study.position_score(other, table))
    scored_kl = torch.where(table.scored, table.kl, 0.0).double()
    place = int(table.position[table.scored][0])
    here = table.position == place
    assert float(study.position_score(table, table)[here][0]) == pytest.approx(float(scored_kl[here].mean()))
    assert scored_kl[here].mean() > 0


def test_gap_closed_is_zero_for_random_and_one_for_the_better_oracle():
    kl = {"random": 0.4, "oracle": 0.2, "reply oracle": 0.1, "gate": 0.1, "position": 0.4, "constant": 0.55}
    assert [study.gap_closed(kl, p) for p in ("gate", "position", "constant")] == pytest.approx([1.0, 0.0, -0.5])
    assert study.gap_closed(dict.fromkeys(kl, 0.3), "gate") is None


def test_study_spans_all_fast_to_all_slow_at_growing_cost(tiny, rows):
    model, tok = tiny
    s = study.routing_study(model, rows, rows, (0.0, 0.5, 1.0), headline=0.4, n_random=2)
    none, half, every = ({p: v["kl"] for p, v in at["policies"].items()} for at in s["shares"])
    assert set(none.values()) == {s["fast"]["kl"]} and s["fast"]["kl"] > 0
    assert every == pytest.approx(dict.fromkeys(every, 0.0), abs=1e-6) and s["slow"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert s["headline"] == 0.5 and s["gap_closed"] == pytest.approx(study.gap_closed(half, "gate"))
    flops = [at["policies"]["gate"]["flops_per_token"] for at in s["shares"]]
    assert flops[0] < flops[1] < flops[2]
    assert s["shares"][1]["policies"]["random"]["slow_share"] == pytest.approx(0.5, abs=1 / s["n_tokens"])


# ---- ablations


@torch.inference_mode()
def test_ablation_touches_only_the_named_branch_and_leaves_nothing_behind(tiny, rows):
    model, _ = tiny
    before = {route: model(rows.tokens, route, doc_start=rows.doc_start).logits for route in ("slow", "fast")}
    for branch, other in (("slow", "fast"), ("fast", "slow")):
        for replaced_by in ("zero", "mean"):
            with study.ablated(model, branch, replaced_by):
                assert torch.equal(model(rows.tokens, other, doc_start=rows.doc_start).logits, before[other])
                assert not torch.allclose(model(rows.tokens, branch, doc_start=rows.doc_start).logits, before[branch])
    assert torch.equal(model(rows.tokens, "slow", doc_start=rows.doc_start).logits, before["slow"])


@torch.inference_mode()
@pytest.mark.parametrize("alike", [False, True])
def test_ablation_touches_its_branchs_tokens_where_both_branches_have_some(alike):
    model = make_tiny_model(400, fast_n_heads=4 if alike else 2, sparse=SparseSpec(block_size=4, window=4, dense_len=64))
    tokens = torch.randint(10, 400, (1, 40), generator=torch.Generator().manual_seed(1))
    use_slow = torch.arange(40)[None] % 3 == 0
    before, found = model(tokens, use_slow), []
    for branch in ("slow", "fast"):
        with study.ablated(model, branch, "zero"):
            found.append(model(tokens, use_slow).hidden)
    assert not any(torch.allclose(after, before.hidden, atol=1e-3) for after in found)
    assert torch.equal(model(tokens, use_slow).logits, before.logits)


@torch.inference_mode()
def test_zero_ablation_makes_a_dual_block_the_identity(tiny, rows):
    model, _ = tiny
    seen = {}
    hook = model.blocks[model.config.n_stem].register_forward_hook(lambda _m, args, out: seen.update(x=args[0], out=out))
    with study.ablated(model, "slow", "zero"):
        model(rows.tokens, "slow", doc_start=rows.doc_start)
    hook.remove()
    assert torch.equal(seen["x"], seen["out"])


def test_ablating_something_else_names_the_choices(tiny):
    with pytest.raises(ValueError, match="slow and fast"), study.ablated(tiny[0], "medium", "zero"):
        pass


# ---- speed and memory


def test_speed_is_measured_for_every_case_on_prompts_that_fit(tiny):
    model, tok = tiny
    teacher = make_tiny_model(tok.vocab_size, n_stem=4, n_tail=0)
    text = torch.randint(20, 300, (120,), generator=torch.Generator().manual_seed(0))
    measured = measure_speed(speed_cases(teacher, model), text, prompt_lengths=(16, 64, 512), n_decode=3, repeats=3)
    assert [(r["case"], r["prompt_tokens"]) for r in measured["rows"]] == [
        (name, n) for name in ("teacher", "student slow", "student fast", "student auto") for n in (16, 64)
    ]
    for r in measured["rows"]:
        assert 0 < r["decode_tokens_per_s"]["low"] <= r["decode_tokens_per_s"]["median"] <= r["decode_tokens_per_s"]["high"]
        assert {"teacher": 1.0, "student slow": 1.0, "student fast": 0.0}.get(r["case"], r["slow_share"]) == r["slow_share"]


def test_memory_parts_add_up_and_match_the_accounting(tiny):
    model, _ = tiny
    m = measure_memory(model)
    assert sum(m["param_bytes_by_part"].values()) == m["param_bytes"] == 4 * m["params"] == 4 * model.cost("slow").params
    assert m["param_bytes_by_part"]["fast branch"] < m["param_bytes_by_part"]["slow branch"]
    c = model.config
    assert m["kv_bytes_per_token"] == 2 * c.n_layers * c.n_kv_heads * c.head_dim * 4


# ---- everything


def test_whole_evaluation_is_deterministic_json_and_names_what_it_skipped(tiny, config):
    model, tok = tiny
    teacher = make_tiny_model(tok.vocab_size, n_stem=4, n_tail=0)
    records: list[dict] = []
    first = run_evaluation(config, tok, model, teacher, None, records.append)
    second = run_evaluation(config, tok, model, teacher, None)
    assert without_timings(first) == without_timings(second)
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert [c["budget"] for c in first["curve"]] == [0.0, 0.3, 1.0]
    assert first["curve"][1]["run"] == "student auto" and "dense baseline" in first["skipped"][0]
    assert {r["stage"] for r in records} == {"evaluation"} and [r["step"] for r in records] == list(range(len(records)))
    assert set(first["shifts"]) == {"numbers", "entities", "phrasing", "numerals"} and set(first["shifts"]["numbers"]) == {"think", "auto"}
    assert first["runs"]["student auto 0"]["slow_share"] == 0.0 and first["runs"]["student auto 1"]["slow_share"] == 1.0
    assert first["gate_examples"] and all({"piece", "g", "use_slow"} == set(t) for x in first["gate_examples"] for t in x["tokens"])


def test_a_student_without_gate_is_evaluated_without_the_parts_it_cannot_have(tiny, config):
    _, tok = tiny
    dense = make_tiny_model(tok.vocab_size, n_stem=4, n_tail=0)
    short = replace(config, evaluation=replace(config.evaluation, n_problems=1, n_shifted=0))
    e = run_evaluation(short, tok, dense, dense, dense)
    assert set(e["runs"]) == {"teacher think", "teacher direct", "student think", "dense think", "dense direct"}
    assert "routing" not in e and e["curve"] == [] and "gate" in e["skipped"][0]


def test_shown_gate_decisions_are_those_of_generation(tiny, config):
    model, tok = tiny
    r = evaluate(model, tok, draw_problems(config)[:3], resolve("auto"), PARAMS)
    for a, shown in zip(r.answers, study.gate_examples(model, tok, r.answers), strict=True):
        assert [t["use_slow"] for t in shown["tokens"]][:-1] == a.generation.use_slow  # the last token was never fed back
        assert a.problem.prompt in "".join(t["piece"] for t in shown["tokens"])
