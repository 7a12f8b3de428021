from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbranch.config import DualBranchConfig
from dualbranch.schema import ConfigError, from_dict, load_yaml, save_yaml, to_dict


@dataclass(frozen=True)
class Gate:
    budget: float = 0.3
    hidden: int = 16
    kind: Literal["probe", "random"] = "probe"

    def __post_init__(self):
        if not 0 <= self.budget <= 1:
            raise ValueError(f"budget is {self.budget}, needed 0 to 1")


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int = 10


@dataclass(frozen=True)
class Config:
    learning_rate: float = 3e-4
    seed: int = 0
    compile: bool = False
    thinking: Literal["on", "off", "auto"] = "auto"
    name: str = "run"
    note: str | None = None
    folder: Path = Path("runs")
    sizes: tuple[int, ...] = (1, 2)
    betas: tuple[float, float] = (0.9, 0.95)
    tasks: list[str] = field(default_factory=list)
    mix: dict[str, float] = field(default_factory=dict)
    either: int | str = 1
    gate: Gate = field(default_factory=Gate)
    teacher_gate: Gate | None = None
    stages: tuple[Stage, ...] = ()
    extra: Any = None


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def load(tmp_path, text, overrides=()):
    return load_yaml(write(tmp_path / "config.yaml", text), Config, overrides)


def refused(tmp_path, text, overrides=()):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(str(tmp_path), "DIR")


def test_a_file_says_only_what_differs(tmp_path):
    config = load(tmp_path, "seed: 7\ngate:\n  hidden: 32\n")
    assert config == Config(seed=7, gate=Gate(hidden=32))


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "{}", "\ufeffseed: 0"])
def test_an_empty_file_means_all_defaults(tmp_path, text):
    assert load(tmp_path, text) == Config()


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "3E-4", "'3e-4'", "+3e-4"])
def test_floats_in_scientific_notation_are_floats(tmp_path, text):
    assert load(tmp_path, f"learning_rate: {text}").learning_rate == 3e-4


def test_an_int_is_a_float_where_a_float_is_needed(tmp_path):
    value = load(tmp_path, "learning_rate: 1").learning_rate
    assert value == 1.0 and type(value) is float


def test_all_supported_types_are_read(tmp_path):
    config = load(
        tmp_path,
        """
        compile: true
        thinking: off
        name: yes
        note: 2024-01-01
        folder: /tmp/x
        sizes: [1_000, 3]
        betas: [0.9, 1]
        tasks: [a, b]
        mix: {a: 1, b: 2e-1}
        either: text
        teacher_gate: {budget: 1}
        stages: [{name: one}, {name: two, steps: 3}]
        extra: {any: [1, x]}
        """,
    )
    assert config == Config(
        compile=True,
        thinking="off",
        name="yes",
        note="2024-01-01",
        folder=Path("/tmp/x"),
        sizes=(1000, 3),
        betas=(0.9, 1.0),
        tasks=["a", "b"],
        mix={"a": 1.0, "b": 0.2},
        either="text",
        teacher_gate=Gate(budget=1.0),
        stages=(Stage("one"), Stage("two", 3)),
        extra={"any": [1, "x"]},
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("sed: 1", "DIR/config.yaml: unknown setting sed, did you mean seed?"),
        ("gate: {buget: 1}", "DIR/config.yaml: unknown setting gate.buget, did you mean gate.budget?"),
        ("budget: 1", "DIR/config.yaml: unknown setting budget, did you mean gate.budget?"),
        ("gate: {zzz: 1}", "DIR/config.yaml: unknown setting gate.zzz; valid here: budget, hidden, kind"),
        ("stages: [{name: a, step: 1}]", "DIR/config.yaml: unknown setting stages[0].step, did you mean stages[0].steps?"),
        ("1: x", "DIR/config.yaml: 1: a setting's name must be text, got 1 (int)"),
        ("learning_rate: fast", "DIR/config.yaml: learning_rate: got 'fast' (str), needed float"),
        ("learning_rate: true", "DIR/config.yaml: learning_rate: got True (bool), needed float"),
        ("seed: true", "DIR/config.yaml: seed: got True (bool), needed int"),
        ("seed: 1.5", "DIR/config.yaml: seed: got 1.5 (float), needed int"),
        ("seed: '1'", "DIR/config.yaml: seed: got '1' (str), needed int"),
        ("seed:", "DIR/config.yaml: seed: got nothing (null), needed int"),
        ("seed: 010", "DIR/config.yaml: seed: got 10.0 (float), needed int"),
        ("compile: 1", "DIR/config.yaml: compile: got 1 (int), needed true or false"),
        ("compile: yes", "DIR/config.yaml: compile: got 'yes' (str), needed true or false"),
        ("name: 3", "DIR/config.yaml: name: got 3 (int), needed str"),
        ("thinking: of", "DIR/config.yaml: thinking: got 'of' (str), needed one of on, off, auto; did you mean off?"),
        ("thinking: 3", "DIR/config.yaml: thinking: got 3 (int), needed one of on, off, auto"),
        ("sizes: 3", "DIR/config.yaml: sizes: got 3 (int), needed a list of int"),
        ("sizes: [1, x]", "DIR/config.yaml: sizes[1]: got 'x' (str), needed int"),
        ("betas: [1]", "DIR/config.yaml: betas: got 1 items, needed 2: [float, float]"),
        ("mix: [a]", "DIR/config.yaml: mix: got ['a'] (list), needed a mapping"),
        ("mix: {a: b}", "DIR/config.yaml: mix.a: got 'b' (str), needed float"),
        ("either: 1.5", "DIR/config.yaml: either: got 1.5 (float), needed int or str"),
        ("gate: 3", "DIR/config.yaml: gate: got 3 (int), needed settings like `name: value`"),
        ("gate:", "DIR/config.yaml: gate: got nothing (null), needed settings like `name: value` (an empty section is written {})"),
        ("seed: {a: 1}", "DIR/config.yaml: seed: got settings (a), needed int"),
        ("gate: {budget: 2}", "DIR/config.yaml: gate: budget is 2.0, needed 0 to 1"),
        ("stages: [{steps: 3}]", "DIR/config.yaml: stages[0].name is not set, and it has no default"),
        ("- a\n- b", "DIR/config.yaml: got a list at the top, needed settings like `name: value`"),
        ("just text", "DIR/config.yaml: got a str at the top, needed settings like `name: value`"),
        ("seed: 1\nseed: 2", "DIR/config.yaml:2: not YAML: 'seed' is set twice"),
        ("base: 3", "DIR/config.yaml: base: got 3 (int), needed the name of a YAML file"),
    ],
)  # fmt: skip
def test_mistakes_name_the_path_what_was_got_and_what_is_needed(tmp_path, text, message):
    assert refused(tmp_path, text) == message


@pytest.mark.parametrize(
    "text, line",
    [("seed: 1\ngate:\n\thidden: 3\n", 3), ("seed: 1\n  x: 2", 2), ("a: [1, 2\nb: 3\n", 2), ("a: 'x", 1), ("a: \x01", 1), ("!!python/object:os.x {}", 1)],
)  # fmt: skip
def test_syntax_errors_are_one_line_with_their_line_number(tmp_path, text, line):
    assert f"DIR/config.yaml:{line}: not YAML:" in refused(tmp_path, text)


def test_tabs_are_named(tmp_path):
    assert "spaces, not tabs" in refused(tmp_path, "gate:\n\thidden: 3\n")


def test_files_that_are_not_utf8_or_nested_without_end_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(tmp_path / "config.yaml", Config)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load(tmp_path, "extra: " + "[" * 20_000)


def test_a_missing_file_names_what_exists(tmp_path):
    for name in ("small.yaml", "large.yaml", "note.txt"):
        write(tmp_path / name, "")
    with pytest.raises(ConfigError) as error:
        load_yaml(tmp_path / "smal.yaml", Config)
    message = str(error.value).replace(str(tmp_path), "DIR")
    assert message == "DIR/smal.yaml: no such file; did you mean DIR/small.yaml?; DIR has large.yaml, small.yaml"
    with pytest.raises(ConfigError, match=r"no such file.*has large.yaml, small.yaml"):
        load_yaml(tmp_path / "absent" / "deeper" / "x.yaml", Config)
    with pytest.raises(ConfigError, match=r"is a folder.*large.yaml"):
        load_yaml(tmp_path, Config)


def test_overrides_win_and_are_parsed_as_yaml(tmp_path):
    overrides = ["gate.budget=1e-1", "sizes=[4, 5]", "thinking=off", "compile=true", "note=null", "name=a=b", "seed=1", "seed=2"]
    config = load(tmp_path, "gate: {budget: 0.9, hidden: 3}\nnote: x", overrides)
    assert config.gate == Gate(budget=0.1, hidden=3)
    assert (config.sizes, config.thinking, config.compile, config.note) == ((4, 5), "off", True, None)
    assert (config.name, config.seed) == ("a=b", 2)


def test_overrides_reach_into_sections_the_file_does_not_have(tmp_path):
    assert load(tmp_path, "", ["teacher_gate.hidden=2"]).teacher_gate == Gate(hidden=2)
    assert load(tmp_path, "gate: {budget: 0.5}", ["gate={hidden: 2}"]).gate == Gate(budget=0.5, hidden=2)


@pytest.mark.parametrize(
    "override, message",
    [
        ("gate.buget=1", "--set gate.buget=1: unknown setting gate.buget, did you mean gate.budget?"),
        ("seed=x", "--set seed=x: seed: got 'x' (str), needed int"),
        ("gate.budget=2", "--set gate.budget=2: gate: budget is 2.0, needed 0 to 1"),
        ("stages=[{nam: 1}]", "--set stages=[{nam: 1}]: unknown setting stages[0].nam, did you mean stages[0].name?"),
        ("seed", "--set seed: needed the form name=value, like gate.budget=0.2"),
        ("=3", "--set =3: needed the form name=value, like gate.budget=0.2"),
        ("a..b=3", "--set a..b=3: needed the form name=value, like gate.budget=0.2"),
        ("name.x=3", "--set name.x=3: name is 'file' (str), it has no settings inside"),
    ],
)
def test_wrong_overrides_name_themselves(tmp_path, override, message):
    assert refused(tmp_path, "name: file", [override]) == message
    assert "not YAML" in refused(tmp_path, "", ["seed=[1"])


def test_base_is_inherited_key_by_key_from_a_relative_path(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "root.yaml", "seed: 1\nname: root\ngate: {hidden: 3, budget: 0.1}\nsizes: [9]")
    write(tmp_path / "deep" / "middle.yaml", "base: ../root.yaml\nname: middle\ngate: {budget: 0.2}")
    config = load(tmp_path, "base: deep/middle.yaml\nsizes: [1]", ["seed=5"])
    assert config == Config(seed=5, name="middle", gate=Gate(hidden=3, budget=0.2), sizes=(1,))


def test_base_that_is_missing_or_circular_is_refused(tmp_path):
    assert "config.yaml: base: DIR/gone.yaml: no such file" in refused(tmp_path, "base: gone.yaml")
    assert "leads back to itself" in refused(tmp_path, "base: config.yaml")


def test_to_dict_and_from_dict_are_inverse_for_the_model_config():
    config = DualBranchConfig(n_layers=7, rope_theta=5e5)
    assert from_dict(DualBranchConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="n_layers is 1000000000"):
        from_dict(DualBranchConfig, {"n_layers": 10**9})
    with pytest.raises(ConfigError, match=r"unknown setting windw, did you mean sparse.window"):
        from_dict(DualBranchConfig, {"windw": 3})


def test_to_dict_holds_only_what_json_and_yaml_know():
    assert to_dict(Config(stages=(Stage("a"),)))["stages"] == [{"name": "a", "steps": 10}]
    assert to_dict(Config())["folder"] == "runs"


names = st.text(max_size=12) | st.sampled_from(["on", "off", "yes", "null", "3e-4", "1_0", "0x1f", "2024-01-01", "<<", "~", "", "1:30", ".inf"])  # fmt: skip
configs = st.builds(
    Config,
    learning_rate=st.floats(allow_nan=False),
    seed=st.integers(-(10**12), 10**12),
    compile=st.booleans(),
    name=names,
    note=st.none() | names,
    sizes=st.lists(st.integers(0, 9)).map(tuple),
    tasks=st.lists(names, max_size=3),
    mix=st.dictionaries(names, st.floats(0, 1), max_size=3),
    either=st.integers() | names,
    gate=st.builds(Gate, budget=st.floats(0, 1), hidden=st.integers(1, 9)),
)


@settings(max_examples=200, deadline=None)
@given(config=configs)
def test_saved_configs_load_back_equal(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "saved" / "config.yaml"
    save_yaml(path, config)
    assert load_yaml(path, Config) == config
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]
    assert from_dict(Config, to_dict(config)) == config


def test_saved_configs_are_plain_yaml_for_other_readers(tmp_path):
    save_yaml(tmp_path / "c.yaml", Config(thinking="off", sizes=(3,)))
    values = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert values["sizes"] == [3] and values["gate"]["budget"] == 0.3


def test_a_field_type_that_cannot_be_read_is_our_own_mistake():
    @dataclass
    class Odd:
        items: frozenset = frozenset()

    with pytest.raises(TypeError, match="items"):
        from_dict(Odd, {"items": [1]})
