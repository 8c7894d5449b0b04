"""The configuration: defaults, refusals that name the key, overrides, and the way to YAML and back."""

from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from pydantic import ValidationError

from see_ray.config import Config, RenamedSettingWarning, Section, load_config
from see_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
MARK = "# see_ray config"
"""The comment line by which a shipped YAML says that it is a configuration."""

SECTIONS = {name: cast("type[Section]", field.annotation) for name, field in Config.model_fields.items()}
FIELDS = [f"{section}.{field}" for section, kind in SECTIONS.items() for field in kind.model_fields]

OTHERS: dict[str, dict[str, Any]] = {
    "base_model": {
        "name": "owner/name",
        "revision": "v1",
        "dtype": "float32",
        "max_length": 512,
        "indicator_tokens": ["<a>", "<b>"],
        "cache_dir": "/tmp/cache",
    },
    "reconstruct": {"rehearsal_share": 0.25, "general_negatives": 0, "general_negatives_file": "general.jsonl"},
    "fit": {
        "form": "full",
        "activation_tokens": "all",
        "target_modules": ["q_proj", "v_proj"],
        "learning_rate": 3e-4,
        "use_gpu": True,
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}, "torch_autocast": None},
        "storage_path": "s3://bucket/runs",
    },
    "calibrate": {"false_accept_rate": 0.05},
    "store": {"url": "s3://bucket/experts"},
    "serve": {"host": "::1", "no_auth": True, "min_replicas": 0, "max_replicas": 3, "replica_gpus": 0.25},
}
"""A configuration in which every kind of value differs from the default."""


def written(tmp_path: Path, text: Any) -> Any:
    path = tmp_path / "see.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Any = None, overrides: Any = None) -> Any:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def configurations(*folders: Any) -> Any:
    """The YAML files below some folders that are configurations of see_ray."""
    found = [path for folder in folders for path in sorted(folder.rglob("*.y*ml"))]
    return [path for path in found if MARK in path.read_text(encoding="utf-8").splitlines()]


def failures(paths: Any) -> Any:
    """What is wrong with configurations, by file."""
    wrong = {}
    for path in paths:
        try:
            load_config(path)
        except ConfigError as error:
            wrong[path.name] = str(error)
    return wrong


# --- defaults ------------------------------------------------------------------------------


def test_no_file_gives_the_defaults() -> None:
    assert load_config() == Config()


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "---\n", "{}\n"])
def test_an_empty_file_gives_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(written(tmp_path, text)) == Config()


def test_empty_sections_give_the_defaults(tmp_path: Path) -> None:
    text = "".join(f"{section}:\n" for section in SECTIONS)
    assert load_config(written(tmp_path, text)) == Config()


def test_defaults_pass_their_own_checks() -> None:
    assert Config.model_validate(Config().model_dump()) == Config()


def test_what_is_not_named_keeps_its_default(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "fit: {r: 4}"))
    assert config.fit.r == 4
    assert config == load_config(None, ["fit.r=4"]) != Config()


# --- refusals ------------------------------------------------------------------------------


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "fit: {learning_rat: 0.1}")
    assert refusal(path) == f"{path} is not valid: fit.learning_rat: no such setting"


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    assert "fitt: no such setting" in refusal(written(tmp_path, "fitt: {r: 1}"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_model.dtype", "float8"),
        ("base_model.max_length", "15"),
        ("base_model.indicator_tokens", "[one]"),
        ("reconstruct.rehearsal_share", "1.1"),
        ("reconstruct.general_negatives", "-1"),
        ("reconstruct.eval_share", "0"),
        ("reconstruct.max_eval_rows", "0"),
        ("fit.form", "half"),
        ("fit.activation_tokens", "0"),
        ("fit.r", "0"),
        ("fit.r", "513"),
        ("fit.lora_alpha", "0"),
        ("fit.lora_dropout", "1"),
        ("fit.learning_rate", "0"),
        ("fit.learning_rate", ".nan"),
        ("fit.num_train_epochs", "0"),
        ("fit.train_batch_size", "0"),
        ("fit.warmup_ratio", "-0.1"),
        ("fit.weight_decay", "-0.1"),
        ("fit.max_grad_norm", "0"),
        ("fit.indicator_weight", "0"),
        ("fit.vocabulary_weight", "1.1"),
        ("fit.seed", "1.5"),
        ("fit.num_workers", "0"),
        ("fit.use_gpu", "maybe"),
        ("fit.cpus_per_worker", "0"),
        ("fit.threads_per_worker", "0"),
        ("fit.zero_stage", "4"),
        ("fit.kv_store_gb", "-1"),
        ("calibrate.false_accept_rate", "0"),
        ("calibrate.false_accept_rate", "1"),
        ("serve.port", "0"),
        ("serve.port", "65536"),
        ("serve.lookahead", "0"),
        ("serve.temperature", "2.1"),
        ("serve.max_body_bytes", "999"),
        ("serve.max_queued_requests", "0"),
        ("serve.min_replicas", "-1"),
        ("serve.prefix_tokens", "0"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_what_was_found(key: str, value: str) -> None:
    message = refusal(overrides=[f"{key}={value}"])
    assert f"{key}" in message
    assert f"found {yaml.safe_load(value)!r}" in message


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, "fit: {r: 0, rank: 3}\nserve: {port: 0}"))
    assert all(key in message for key in ("fit.r:", "fit.rank:", "serve.port:"))


def test_replica_bounds_out_of_order_are_refused_with_both() -> None:
    message = refusal(overrides=["serve.min_replicas=3", "serve.max_replicas=2"])
    assert "max_replicas (2) is below min_replicas (3)" in message


def test_equal_replica_bounds_are_taken() -> None:
    assert load_config(None, ["serve.min_replicas=3", "serve.max_replicas=3"]).serve.max_replicas == 3


def test_a_section_that_is_a_value_is_refused(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, "fit: 3"))
    assert "fit: " in message
    assert "found 3" in message


@pytest.mark.parametrize("text", ["- fit\n", "fit\n", "3\n"])
def test_a_file_without_sections_is_refused_with_what_it_holds(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert refusal(path).startswith(f"{path} holds a {type(yaml.safe_load(text)).__name__}")


def test_a_file_that_is_not_yaml_is_refused_in_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, "fit: {r: 3\nserve: ]")
    message = refusal(path)
    assert message.startswith(f"{path} is not YAML")
    assert "\n" not in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "no.yaml") == f"cannot read the configuration {tmp_path}/no.yaml: No such file or directory"
    )


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assert "see.yaml" in refusal(written(tmp_path, b"fit: {r: 3} # \xff\n"))


@pytest.mark.parametrize("key", ["fit.learning_rate", "fit.lora_alpha", "serve.poll_s"])
def test_infinity_is_refused(key: str) -> None:
    assert key in refusal(overrides=[f"{key}=.inf"])


# --- overrides -----------------------------------------------------------------------------


def test_overrides_are_read_as_yaml() -> None:
    config = load_config(None, ["fit.use_gpu=false", "fit.target_modules=[a, b]", "base_model.max_length=null"])
    assert (config.fit.use_gpu, config.fit.target_modules, config.base_model.max_length) == (False, ("a", "b"), None)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "fit: {r: 4, seed: 7}"), ["fit.r=8"])
    assert (config.fit.r, config.fit.seed) == (8, 7)


def test_the_last_override_wins() -> None:
    assert load_config(None, ["fit.r=8", "fit.r=9"]).fit.r == 9


def test_an_override_reaches_into_a_mapping(tmp_path: Path) -> None:
    path = written(tmp_path, "fit: {deepspeed: {zero: {a: 1}}}")
    assert load_config(path, ["fit.deepspeed.zero.b=2"]).fit.deepspeed == {"zero": {"a": 1, "b": 2}}


def test_a_value_may_hold_an_equals_sign() -> None:
    assert load_config(None, ["store.url=s3://bucket/a=b"]).store.url == "s3://bucket/a=b"


@pytest.mark.parametrize("override", ["fit.r", "r=3", "=3", "fit.=3", ".r=3", ""])
def test_an_override_of_another_form_is_refused_with_the_form(override: str) -> None:
    message = refusal(overrides=[override])
    assert repr(override) in message
    assert "section.field=value" in message


def test_an_override_whose_value_is_not_yaml_is_refused() -> None:
    assert "fit.r" in refusal(overrides=["fit.r=[1"])


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    assert "r is not a section" in refusal(written(tmp_path, "fit: {r: 3}"), ["fit.r.more=1"])


def test_an_override_of_an_unknown_key_is_named() -> None:
    assert "fit.rank: no such setting" in refusal(overrides=["fit.rank=3"])


def test_an_override_in_an_empty_section_is_applied(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "fit:\n"), ["fit.r=4"]).fit.r == 4


# --- to YAML and back ----------------------------------------------------------------------


@pytest.mark.parametrize("data", [{}, OTHERS], ids=["defaults", "others"])
def test_the_resolved_configuration_reads_back_unchanged(tmp_path: Path, data: Any) -> None:
    config = Config.model_validate(data)
    assert load_config(written(tmp_path, config.to_yaml())) == config


def test_the_resolved_configuration_names_every_field() -> None:
    data = yaml.safe_load(Config().to_yaml())
    assert [f"{section}.{field}" for section, fields in data.items() for field in fields] == FIELDS


def test_the_values_of_a_file_arrive(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, yaml.safe_dump(OTHERS)))
    for section, fields in OTHERS.items():
        arrived = getattr(config, section).model_dump(mode="json")
        assert {key: arrived[key] for key in fields} == fields


def test_sections_are_frozen() -> None:
    config = Config()
    for section in (config, *(getattr(config, name) for name in SECTIONS)):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, next(iter(type(section).model_fields)), None)


# --- descriptions --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_docstring(name: Any) -> None:
    section, field = name.split(".")
    assert (SECTIONS[section].model_fields[field].description or "").rstrip().endswith(".")


def test_every_section_has_a_docstring_of_its_own() -> None:
    assert all(kind.__doc__ and kind.__doc__ != Section.__doc__ for kind in (Config, *SECTIONS.values()))


# --- shipped files -------------------------------------------------------------------------


def test_every_shipped_configuration_loads() -> None:
    assert failures(configurations(ROOT / "cluster", ROOT / "docs")) == {}


def test_a_shipped_configuration_that_does_not_load_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "good.yaml").write_text(f"{MARK}\nfit: {{r: 4}}\n")
    (tmp_path / "wrong.yml").write_text(f"# Another comment.\n{MARK}\nfit: {{rank: 4}}\n")
    (tmp_path / "other.yaml").write_text("kind: RayCluster\n")
    found = configurations(tmp_path)
    assert [path.name for path in found] == ["good.yaml", "wrong.yml"]
    assert list(failures(found)) == ["wrong.yml"]


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("[2, 8]", (2, 8)), ("[1, 1]", (1, 1))])
def test_workers_are_a_number_or_least_and_most(text: str, value: Any) -> None:
    assert load_config(None, [f"fit.num_workers={text}"]).fit.num_workers == value


@pytest.mark.parametrize("text", ["0", "-1", "[0, 2]", "[3, 2]", "[1, 2, 3]", "many"])
def test_no_workers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="num_workers"):
        load_config(None, [f"fit.num_workers={text}"])


# --- names of 0.1 --------------------------------------------------------------------------

RENAMED = [
    ("fit", "pass_tokens", "max_tokens_per_micro_batch", 4096),
    ("serve", "pass_tokens", "max_num_batched_tokens", 256),
    ("serve", "look_back_s", "look_back_period_s", 12.5),
    ("serve", "traced_share", "trace_sample_rate", 0.5),
]


def test_every_renamed_setting_is_tested() -> None:
    names = {(section, old, new) for section, kind in SECTIONS.items() for old, new in kind.renamed.items()}
    assert names == {(section, old, new) for section, old, new, _ in RENAMED}


@pytest.mark.parametrize(("section", "old", "new", "value"), RENAMED)
def test_an_old_name_in_a_file_is_read_with_a_warning(
    tmp_path: Path, section: Any, old: Any, new: Any, value: Any
) -> None:
    path = written(tmp_path, f"{section}: {{{old}: {value}}}")
    with pytest.warns(FutureWarning, match=f"^the setting {old} is now called {new}; ") as caught:
        config = load_config(path)
    assert getattr(getattr(config, section), new) == value
    assert [warning.category for warning in caught] == [RenamedSettingWarning]


@pytest.mark.parametrize(("section", "old", "new", "value"), RENAMED)
def test_an_old_name_in_an_override_is_read_with_a_warning(section: Any, old: Any, new: Any, value: Any) -> None:
    with pytest.warns(RenamedSettingWarning):
        config = load_config(None, [f"{section}.{old}={value}"])
    assert getattr(getattr(config, section), new) == value


@pytest.mark.parametrize(("section", "old", "new", "value"), RENAMED)
def test_the_old_and_the_new_name_together_in_a_file_are_refused_with_both(
    tmp_path: Path, section: Any, old: Any, new: Any, value: Any
) -> None:
    message = refusal(written(tmp_path, f"{section}: {{{old}: {value}, {new}: {value}}}"))
    assert f"{section}: " in message
    assert f"{old} is the old name of {new}" in message


@pytest.mark.parametrize(("section", "old", "new", "value"), RENAMED)
def test_a_value_out_of_bounds_under_an_old_name_is_refused(section: Any, old: Any, new: Any, value: Any) -> None:
    with pytest.warns(RenamedSettingWarning):
        assert f"{section}.{new}: " in refusal(overrides=[f"{section}.{old}=-1"])


@pytest.mark.parametrize(("section", "old", "new", "value"), RENAMED)
def test_an_old_name_is_not_written_again(section: Any, old: Any, new: Any, value: Any) -> None:
    with pytest.warns(RenamedSettingWarning):
        text = load_config(None, [f"{section}.{old}={value}"]).to_yaml()
    assert old not in yaml.safe_load(text)[section]
    assert yaml.safe_load(text)[section][new] == value


def test_the_current_names_are_read_without_a_warning() -> None:
    load_config(None, [f"{section}.{new}={value}" for section, _, new, value in RENAMED])  # warnings are errors here


@pytest.mark.parametrize(
    ("in_file", "override"),
    [("pass_tokens", "max_num_batched_tokens"), ("max_num_batched_tokens", "pass_tokens")],
)
@pytest.mark.filterwarnings("ignore::see_ray.config.RenamedSettingWarning")
def test_an_override_replaces_a_setting_under_its_other_name(tmp_path: Path, in_file: str, override: str) -> None:
    path = written(tmp_path, f"serve: {{{in_file}: 64}}")
    assert load_config(path, [f"serve.{override}=128"]).serve.max_num_batched_tokens == 128
