"""Claims about `python infer.py`: what it prints where, and what it says when something is wrong. Runs `main(argv)` in this process."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_tiny_model
from public_models import tokenizer_of
from strict_steps import strict_steps

from dualbranch import infer
from dualbranch.chat import split_reply
from dualbranch.checkpoint import LoadedModel, load, save_checkpoint
from dualbranch.cli import main as cli_main
from dualbranch.conversation import Conversation
from dualbranch.convert.export import fast_model
from dualbranch.generate import generate
from dualbranch.precision import quantize
from dualbranch.sampling import SamplingParams

ROOT = Path(__file__).parent.parent
MODES = ("fast", "think", "auto")


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    """A folder with `runs/little/student`."""
    folder = tmp_path_factory.mktemp("work")
    save_checkpoint(folder / "runs" / "little" / "student", *tiny)
    return folder


class Stdin(io.StringIO):
    def __init__(self, text="", tty=False):
        super().__init__(text)
        self.tty = tty

    def isatty(self):
        return self.tty


@pytest.fixture
def cli(run_folder, monkeypatch, capsys):
    """`cli("--mode fast ...", stdin=...)` -> (exit code, stdout, stderr), in a folder that has a run."""
    monkeypatch.chdir(run_folder)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def call(*argv, stdin=None):
        monkeypatch.setattr("sys.stdin", stdin or Stdin(tty=True))
        code = infer.main(list(argv))
        return code, *capsys.readouterr()

    return call


def ask(*argv):
    return ("--prompt", "the sum of two numbers", "--max-tokens", "24", "--device", "cpu", *argv)


# ---- one reply


@pytest.mark.parametrize("mode", MODES)
def test_answer_goes_to_stdout_and_the_closing_line_to_stderr(cli, run_folder, mode):
    code, out, err = cli(*ask("--mode", mode, "--model", "little"))
    want = generate(load("runs/little"), "the sum of two numbers", mode, max_tokens=24)
    assert code == 0
    if want.thought:
        assert out == f"<think>{want.reasoning}</think>\n{want.answer}\n"
    else:
        assert out == f"{want.answer}\n"
    assert len(err.splitlines()) == 1
    assert re.search(r"24 tokens \(\d+ reasoning\) · [\d.]+ tokens/s · first token \d+ ms · \d+% slow · [\d.]+ MFLOPs", err), err
    assert ("100% slow" in err) == (mode == "think") and (" 0% slow" in err) == (mode == "fast")


def test_the_newest_run_and_piped_text_are_the_defaults(cli):
    piped = cli("--max-tokens", "24", "--mode", "fast", stdin=Stdin("the sum of two numbers"))
    assert piped[:2] == cli(*ask("--mode", "fast", "--model", "runs/little/student"))[:2]
    assert piped[:2] == cli(*ask("--mode", "fast")[2:], "--prompt", "-", stdin=Stdin("the sum of two numbers"))[:2]


def test_knobs_reach_the_generation(cli, run_folder):
    args = "--route slow --thinking on --thinking-budget 3 --temperature 0.9 --top-k 20 --top-p 0.9 --min-p 0.01 --seed 4 --json".split()
    code, out, _ = cli(*ask("--mode", "fast", *args))
    want = generate(
        load("runs/little"), "the sum of two numbers", "fast", route="slow", thinking="on", thinking_budget=3,
        temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=4, max_tokens=24,
    )  # fmt: skip
    assert code == 0 and json.loads(out)["ids"] == want.ids and want.n_think == 3


@pytest.mark.parametrize("mode", MODES)
def test_json_is_one_valid_object_with_everything(cli, tiny, mode):
    code, out, err = cli(*ask("--mode", mode, "--json", "--show-gate"))
    result = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    reply = split_reply(tiny[1], result["ids"])
    assert (result["answer"], result["reasoning"], result["thought"]) == (reply.answer, reply.reasoning, reply.thought)
    assert result["mode"]["name"] == mode and result["finish_reason"] in ("stop", "length")
    assert result["n_generated"] == len(result["ids"]) == len(result["tokens"])
    assert result["flops"] > 0 and 0 < result["seconds_to_first_token"] <= result["seconds"] and result["tokens_per_second"] > 0
    assert result["slow_share"] == {"fast": 0.0, "think": 1.0}.get(mode, result["slow_share"])
    assert "".join(t["piece"] for t in result["tokens"] if t["phase"] == "answer") == reply.answer
    assert all((t["g"] is not None) == (mode == "auto") for t in result["tokens"])


def test_precision_rounds_the_weights_and_says_how_to_make_it_fast(cli, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("DUALBRANCH_CACHE", str(tmp_path))
    code, out, err = cli(*ask("--mode", "think", "--precision", "int8"))
    assert code == 0 and "dualbranch compile" in err
    rounded = quantize(copy.deepcopy(tiny[0]), "int8")
    expected = generate(LoadedModel(rounded, tiny[1]), "the sum of two numbers", mode="think", max_tokens=24)
    assert expected.answer.strip() in out
    for flag in ((), ("--precision", "fp32"), ("--no-compile",)):
        assert "compile" not in cli(*ask(*flag))[2]


def test_compiled_code_for_int8_alone_makes_int8_the_default(cli, monkeypatch):
    monkeypatch.setattr("dualbranch.compiled.is_built", lambda model, precision: precision == "int8")
    monkeypatch.setattr("dualbranch.compiled.load_steps", strict_steps)
    code, out, err = cli(*ask("--mode", "think"))
    assert code == 0 and "rounded to int8" in err
    assert "rounded" not in cli(*ask("--mode", "think", "--no-compile"))[2]
    assert "rounded" not in cli(*ask("--mode", "think", "--precision", "fp32"))[2]


def test_quantize_writes_a_smaller_checkpoint_that_infer_runs(cli, run_folder, tmp_path, capsys):
    out = tmp_path / "small"
    assert cli_main(["quantize", str(run_folder / "runs" / "little"), "--precision", "int4", "--out", str(out)]) == 0
    assert "int4" in capsys.readouterr().out
    code, reply, err = cli(*ask("--model", str(out), "--mode", "fast"))
    assert code == 0 and reply.strip()
    for argv, words in (
        (["quantize", str(out), "--out", str(tmp_path / "b")], "already"),
        (["quantize", str(run_folder / "runs" / "little"), "--out", str(out)], "exists already"),
        (["quantize", str(run_folder / "runs" / "little"), "--precision", "int5", "--out", str(tmp_path / "b")], "int5"),
        (["quantize", str(run_folder / "runs" / "little"), "--precision", "fp32", "--out", str(tmp_path / "b")], "fp32"),
    ):
        assert cli_main(argv) == infer.USAGE_ERROR
        assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_fast_branch_alone_is_quantized_and_runs(cli, run_folder, tmp_path, capsys):
    alone, small = str(tmp_path / "alone"), str(tmp_path / "small")
    assert cli_main(["export", str(run_folder / "runs" / "little"), "--branch", "fast", "--out", alone]) == 0
    assert cli_main(["quantize", alone, "--out", small]) == 0
    assert "int8" in capsys.readouterr().out
    for mode in ((), ("--mode", "fast")):
        code, reply, err = cli(*ask("--model", small, *mode))
        assert code == 0 and reply.strip()
    code, reply, err = cli(*ask("--model", small, "--mode", "think"))
    assert code == infer.USAGE_ERROR and "mode fast" in err and not reply.strip()
    assert "leave it out" in cli(*ask("--model", small, "--budget", "0.3"))[2]
    loaded = load(small)
    for found in (generate(loaded, "1 + 1?", max_tokens=3), Conversation(loaded).send("1 + 1?", params=SamplingParams(max_tokens=3))):
        assert found.n_answer and not any(found.use_slow)


def test_a_budget_moves_the_share_of_slow_tokens(cli):
    shares = [json.loads(cli(*ask("--json", "--thinking", "off", "--budget", b))[1])["slow_share"] for b in ("0", "0.3", "0.8", "1")]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1 and 0 < shares[1] < shares[2] < 1


# ---- colours


def test_reasoning_is_dimmed_in_colour_and_tagged_without(cli, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = cli(*ask("--mode", "think"))[1]
    assert infer.DIM in out and "<think>" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    out = cli(*ask("--mode", "think"))[1]
    assert "\x1b" not in out and out.startswith("<think>")


def test_show_gate_colours_by_branch_or_says_that_it_cannot(cli, monkeypatch):
    code, out, err = cli(*ask("--mode", "fast", "--show-gate"))
    assert code == 0 and "--show-gate needs a terminal" in err and "\x1b" not in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    fast, slow, auto = (cli(*ask("--mode", mode, "--show-gate"))[1] for mode in MODES)
    assert infer.FAST in fast and infer.SLOW not in fast
    assert infer.SLOW in slow and infer.FAST not in slow
    assert infer.SLOW in auto and infer.FAST in auto


def test_a_model_cannot_drive_the_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    infer.Printer(out)._write("", "a\x1b[2Jb\x07\x9b1m\n\tc")
    assert out.getvalue() == "a\ufffd[2Jb\ufffd\ufffd1m\n\tc"
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    infer.Printer(terminal)._write("", "a\x1b[2Jb")
    assert terminal.getvalue() == "a\ufffd[2Jb"


# ---- errors


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--mode", "quick"], ["quick", "fast", "think", "auto"]),
        (["--route", "medium"], ["medium", "fast", "slow", "auto"]),
        (["--budget", "1.5"], ["budget", "1.5", "[0, 1]"]),
        (["--budget", "-0.1"], ["budget", "[0, 1]"]),
        (["--budget", "nan"], ["budget", "nan"]),
        (["--budget", "much"], ["--budget", "much"]),
        (["--mode", "fast", "--budget", "0.5"], ["budget", "route fast"]),
        (["--mode", "fast", "--thinking-budget", "5"], ["thinking_budget", "off"]),
        (["--thinking-budget", "-1"], ["thinking_budget", "-1"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--top-p", "0"], ["top_p"]),
        (["--max-tokens", "1"], ["max_tokens"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt", " \n "], ["prompt is empty"]),
        (["--prompt", "two numbers " * 500], ["tokens", "at most 254"]),
        (["--prompt", "bad \udcff"], ["surrogate"]),
        (["--model", "missing"], ["missing", "little"]),
        (["--model", "runs/little/student/config.json"], ["config.json"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--colour"], ["--colour"]),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(cli, argv, words):
    if "--prompt" not in argv:
        argv = ["--prompt", "the sum", *argv]
    code, out, err = cli(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert all(word in err for word in words), err


def test_without_a_run_the_error_names_the_command_that_makes_one(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("--prompt", "hi")
    assert code == 2 and len(err.splitlines()) == 1
    assert "make demo" in err and "python train.py" in err


def test_empty_stdin_and_json_without_a_prompt_are_errors(cli):
    assert cli(stdin=Stdin(" \n"))[0] == 2
    code, _, err = cli("--json")
    assert code == 2 and "--json needs a prompt" in err


def test_help_names_every_mode_and_exits_0(cli):
    code, out, _ = cli("--help")
    assert code == 0 and all(mode in out for mode in MODES)


def test_the_script_runs_as_a_process_and_ends_quietly_when_its_reader_goes(run_folder):
    argv = [sys.executable, str(ROOT / "infer.py"), "--mode", "fast", "--max-tokens", "8", "--prompt", "the sum"]
    done = subprocess.run(argv, cwd=run_folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip() and done.stderr.startswith("[")
    with subprocess.Popen(argv, cwd=run_folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(("ending", "code", "words"), [("| true", 0, ""), ("> /dev/full", 2, "error: [Errno 28] No space left on device\n")])
@pytest.mark.parametrize("arguments", ["--mode fast --max-tokens 8 --prompt hi --json", "--help"])
def test_what_cannot_be_written_at_the_end_is_noticed(run_folder, ending, code, words, arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    line = f"set -o pipefail; {sys.executable} {ROOT / 'infer.py'} {arguments} {ending}"
    done = subprocess.run(["bash", "-c", line], cwd=run_folder, capture_output=True, text=True, timeout=600, env=environment)
    assert (done.returncode, done.stderr) == (code, words)


def test_a_commands_own_error_counts_whatever_becomes_of_its_output(capsys):
    def failing():
        print("so far")
        raise ValueError("its own error")

    assert infer.guarded(failing) == 2 and capsys.readouterr().err == "error: its own error\n"
    line = "import sys; from dualbranch import infer\ndef f():\n print('so far'); raise ValueError('its own error')\nsys.exit(infer.guarded(f))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for target in ("> /dev/full", "| true"):
        script = f"set -o pipefail; {sys.executable} -c \"$LINE\" {target}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment | {"LINE": line})
        assert (done.returncode, done.stderr) == (2, "error: its own error\n")


def test_standard_streams_may_be_closed(run_folder):
    for closed, code in (("<&-", 2), (">&- --mode fast --max-tokens 8 --prompt hi", 0), ("2>&- --mode fast --max-tokens 8 --prompt hi --json", 0)):
        line = f"{sys.executable} {ROOT / 'infer.py'} {closed}"
        done = subprocess.run(["bash", "-c", line], cwd=run_folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == code and "Traceback" not in done.stderr
        assert "--json" not in closed or json.loads(done.stdout)["answer"]
    assert infer.main(["--prompt", "hi", "--device", "meta"]) == 2


# ---- conversation


@pytest.fixture
def talk(tiny, monkeypatch, capsys):
    """`talk(lines)` -> (exit code, session, stdout, stderr); a line may be an exception for input() to raise."""

    def call(*lines, mode="auto", budget=None):
        queue = [*lines, EOFError()]

        def fake_input(prompt):
            line = queue.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", fake_input)
        session = infer.Session(Conversation(LoadedModel(*tiny)), infer.resolve(mode, budget=budget), budget, None)
        code = infer.converse(session, "tiny", SamplingParams(max_tokens=12), infer.Printer(sys.stdout))
        return code, session, *capsys.readouterr()

    return call


def test_a_conversation_keeps_its_cache_and_changes_mode_on_command(talk):
    code, session, _, err = talk("the sum", "/mode fast", "how many", "/mode think", "a", "/quit", "never read")
    assert code == 0 and session.mode.name == "think"
    reused = [int(n) for n in re.findall(r"(\d+) of \d+ prompt tokens reused", err)]
    assert len(reused) == 3 and reused[0] == 0 and reused[1] > 0
    assert [m["role"] for m in session.conversation.messages] == ["user", "assistant"] * 3


def test_budget_is_kept_while_a_mode_without_it_is_on(talk):
    _, session, _, err = talk("/budget 0.25", "/mode fast", "/mode auto")
    assert session.mode.budget == 0.25
    _, session, _, err = talk("/mode fast", "/budget 0.5", "the sum", "/mode auto")
    assert session.mode.budget == 0.5 and "will count in mode auto" in err
    _, session, _, _ = talk("/budget", budget=0.75)
    assert session.mode.budget is None


def test_mistakes_in_a_conversation_cost_a_message_each(talk):
    code, session, out, err = talk("/mode quick", "/budget 7", "/budget x", "/nothing", "", "two numbers " * 500, "/help", "/reset", "the sum")
    assert code == 0 and out.strip()
    assert err.count("error: ") == 5 and "Traceback" not in err
    assert len(session.conversation.messages) == 2


def test_commands_offer_what_the_model_has(tiny):
    session = infer.Session(Conversation(LoadedModel(fast_model(tiny[0]), tiny[1])), infer.resolve("fast"), None, None)
    for command in (("/mode", "think"), ("/mode", "auto"), ("/budget", "0.3")):
        with pytest.raises(ValueError, match="the model has its fast branch alone"):
            session.obey(*command)
    assert session.obey("/mode", "fast").startswith("mode fast")
    tok = tokenizer_of("smollm2")
    session = infer.Session(Conversation(LoadedModel(make_tiny_model(tok.vocab_size), tok)), infer.resolve("fast"), None, None)
    assert session.obey("/mode", "think") == "mode think: route slow, thinking off."


def test_ctrl_c_once_warns_twice_leaves_and_a_line_between_counts_anew(talk):
    assert talk(KeyboardInterrupt(), KeyboardInterrupt(), "never read")[0] == infer.INTERRUPTED
    code, session, _, err = talk(KeyboardInterrupt(), "the sum", KeyboardInterrupt(), "/quit")
    assert code == 0 and err.count("Ctrl-C again") == 2


def test_ctrl_c_during_a_reply_keeps_what_was_said_and_goes_on(talk, monkeypatch):
    write, n = infer.Printer._write, []

    def interrupted_write(self, style, text):
        n.append(text)
        if len(n) == 4:
            raise KeyboardInterrupt
        write(self, style, text)

    monkeypatch.setattr(infer.Printer, "_write", interrupted_write)
    code, session, _, err = talk("the sum", "how many")
    assert code == 0 and "stopped." in err
    assert [m["role"] for m in session.conversation.messages] == ["user", "assistant"] * 2
    assert 0 < len(session.conversation.messages[1]["ids"]) < 12


def test_an_answer_held_back_is_timed_as_a_whole_and_not_by_its_last_instant():
    assert infer.Timing(first=2.0, total=2.001, n_tokens=4, held=True).tokens_per_second == pytest.approx(2, rel=0.01)
    assert infer.Timing(first=1.0, total=3.0, n_tokens=5).tokens_per_second == 2
