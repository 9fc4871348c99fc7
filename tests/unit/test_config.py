"""The configuration as users meet it: layers, spellings, and a clear line for whatever is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from services import config as configuration
from services.config import ALIASES, PRESETS, ConfigError, RunConfig, describe, dump, load, schema, validate


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def complaint(*flags: str, file: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """What a user is told about this configuration."""
    with pytest.raises(ConfigError) as caught:
        load(file, environment, flags)
    return str(caught.value)


# -------------------------------------------------------------------------------------------- layers


def test_without_anything_the_defaults_are_the_atari_column_of_the_paper() -> None:
    config = load()
    assert (config.unroll_length, config.batch_size, config.loss.discount) == (20, 32, 0.99)
    assert (config.optimiser.learning_rate, config.optimiser.max_grad_norm) == (6e-4, 40.0)
    assert config.total_steps * config.env.frame_skip == 200_000_000


def test_each_layer_overrides_the_ones_before_it(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "preset: torchbeast\nbatch_size: 4\nseed: 2\ncheckpoint: {keep: 5}\n")
    environment = {"IMPALA__SEED": "3", "IMPALA__CHECKPOINT__KEEP": "6"}
    config = load(file, environment, ["--checkpoint.keep", "7"])
    assert config.unroll_length == 80, "from the preset"
    assert config.batch_size == 4, "from the file, over the preset"
    assert config.seed == 3, "from the environment, over the file"
    assert config.checkpoint.keep == 7, "from the flags, over all"


def test_a_later_layer_may_choose_the_preset_and_earlier_values_still_override_it(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "batch_size: 16\n")
    config = load(file, {"IMPALA__PRESET": "machado"}, ["--preset", "torchbeast"])
    assert (config.preset, config.unroll_length, config.batch_size) == ("torchbeast", 80, 16)
    assert config.env.sticky_actions == 0.0


def test_a_preset_does_not_hide_behind_a_file_that_was_made_with_another(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "preset: machado\n")
    with pytest.raises(ConfigError, match=r"preset = 'torchbeast': the file .* was made with 'machado'"):
        load(file, {}, ["--preset", "torchbeast"])
    assert load(file, {}, ["--preset", "machado"]).preset == "machado"


@pytest.mark.parametrize(("text", "value"), [("1e6", 1_000_000), ("1.5E3", 1500), ("2_000", 2000)])
def test_whole_numbers_may_be_written_with_an_exponent(text: str, value: int) -> None:
    assert load(flags=["--total-steps", text]).total_steps == value


def test_layers_meet_within_a_section_and_not_over_it(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "loss: {entropy_cost: 0.02}\n")
    config = load(file, {"IMPALA__LOSS__DISCOUNT": "0.9"}, ["--loss.baseline_cost", "0.25"])
    assert (config.loss.entropy_cost, config.loss.discount, config.loss.baseline_cost) == (0.02, 0.9, 0.25)


def test_environment_arguments_are_replaced_whole(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "env: {id: catch, kwargs: {rows: 8, columns: 4}}\n")
    assert load(file, {}, ["--env.kwargs", "{rows: 12}"]).env.kwargs == {"rows": 12}


def test_tasks_are_named_or_described(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "tasks: [catch, {id: catch, name: far, kwargs: {rows: 20}}]\n")
    near, far = load(file).tasks
    assert (near.id, near.name, near.kwargs) == ("catch", None, {})
    assert (far.id, far.name, far.kwargs) == ("catch", "far", {"rows": 20})
    assert [task.id for task in load(flags=["--tasks", "catch,recall"]).tasks] == ["catch", "recall"]
    assert load(flags=["--tasks", "[catch, {id: catch, name: far, kwargs: {rows: 20}}]"]).tasks == (near, far)
    assert validate(dump(load(file))) == load(file)


@pytest.mark.parametrize("flags", [["--preset", "dmlab30"], ["--tasks", "pong,breakout"]])
def test_an_environment_beside_tasks_is_refused_and_instead_of_them_is_not(flags: list[str]) -> None:
    assert complaint(*flags, "--env", "catch").startswith("env.id = 'catch': has no effect beside tasks = ")
    assert "has no effect" in complaint(*flags, environment={"IMPALA__ENV__ID": "catch"})
    alone = load(flags=[*flags, "--env", "catch", "--tasks", "[]"])
    assert (alone.env.id, alone.tasks) == ("catch", ())


def test_a_resumed_run_keeps_its_tasks_and_whatever_stands_beside_them(tmp_path: Path) -> None:
    config = load(flags=["--tasks", "pong, breakout"])
    assert [task.id for task in config.tasks] == ["pong", "breakout"]
    file = write(tmp_path / "config.json", json.dumps(dump(config)))
    assert load(file) == config


@pytest.mark.parametrize(
    ("flags", "clipping"),
    [
        ([], "abs_one"),
        (["--popart"], "none"),
        (["--popart", "--loss.reward_clipping", "abs_one"], "abs_one"),
        (["--loss.reward_clipping", "soft_asymmetric"], "soft_asymmetric"),
    ],
)
def test_popart_does_without_clipping_unless_it_is_asked_for(flags: list[str], clipping: str) -> None:
    assert load(flags=flags).reward_clipping == clipping


@pytest.mark.parametrize("flag", ["--no-lstm", "--no-network.lstm", "--no_lstm"])
def test_a_preset_s_switch_is_switched_off_by_any_of_its_names(flag: str) -> None:
    assert load(flags=["--preset", "seed-pong", flag]).network.lstm is False


def test_replay_shares_a_batch_with_fresh_experience() -> None:
    config = load(flags=["--replay.ratio", "7"])
    assert (config.fresh_per_update, config.steps_per_update) == (4, 80)
    assert (load().fresh_per_update, load().steps_per_update) == (32, 640)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset: str) -> None:
    assert load(flags=["--preset", preset]).preset == preset


def test_an_empty_file_is_a_file_of_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path / "run.yaml", "# nothing yet\n")) == load()


def test_json_is_read_too(tmp_path: Path) -> None:
    file = write(tmp_path / "run.json", json.dumps({"seed": 5, "optimiser": {"learning_rate": 1e-5}}))
    assert load(file).optimiser.learning_rate == 1e-5


@pytest.mark.parametrize("spelling", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "+1e-4", "100e-6"])
def test_yaml_reads_every_usual_spelling_of_a_small_number(tmp_path: Path, spelling: str) -> None:
    file = write(tmp_path / "run.yaml", f"optimiser: {{learning_rate: {spelling}}}\n")
    assert load(file).optimiser.learning_rate == pytest.approx(1e-4)


def test_a_whole_number_is_a_fine_value_for_a_real_one(tmp_path: Path) -> None:
    assert load(write(tmp_path / "run.yaml", "loss: {entropy_cost: 1}\n")).loss.entropy_cost == 1.0


# ------------------------------------------------------------------------------- flags and variables


@pytest.mark.parametrize(
    "flags",
    [
        ["--learner.queue_capacity", "64"],
        ["--learner.queue_capacity=64"],
        ["--learner.queue-capacity", "64"],
    ],
)
def test_flags_have_several_spellings(flags: list[str]) -> None:
    assert load(flags=flags).learner.queue_capacity == 64


@pytest.mark.parametrize(("alias", "key"), ALIASES.items())
def test_every_alias_is_its_key(alias: str, key: str) -> None:
    section, name = key.split(".")
    value = {"str": "cuda", "float": "0.5", "int": "8", "bool": "true", "NoneType": "8"}[
        type(getattr(getattr(load(), section), name)).__name__
    ]
    assert load(flags=[f"--{alias}", value]) == load(flags=[f"--{key}", value]) != load()


def test_the_last_of_two_equal_flags_counts() -> None:
    assert load(flags=["--seed", "1", "--seed", "2"]).seed == 2


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--env.life_loss_ends_episode"], True),
        (["--env.life_loss_ends_episode", "true"], True),
        (["--env.life_loss_ends_episode", "--seed", "3"], True),
        (["--env.life_loss_ends_episode=true"], True),
        (["--env.life_loss_ends_episode", "false"], False),
        (["--env.life_loss_ends_episode=false"], False),
    ],
)
def test_a_switch_needs_no_value(flags: list[str], value: bool) -> None:
    assert load(flags=flags).env.life_loss_ends_episode is value


@pytest.mark.parametrize("null", ["null", "none", "None"])
def test_an_optional_value_can_be_taken_back(tmp_path: Path, null: str) -> None:
    file = write(tmp_path / "run.yaml", "learner: {queue_capacity: 64}\n")
    assert load(file, {}, ["--learner.queue_capacity", null]).learner.queue_capacity is None


@pytest.mark.parametrize(
    "value", ["pong,breakout", "pong, breakout", '["pong", "breakout"]', "[pong, breakout]"]
)
def test_a_list_is_separated_by_commas_or_written_as_a_list(value: str) -> None:
    assert [task.id for task in load(flags=["--tasks", value]).tasks] == ["pong", "breakout"]


def test_only_variables_with_our_prefix_are_read() -> None:
    """Kubernetes itself sets the others in the pods of a release that is called impala."""
    kubernetes = {"IMPALA_LEARNER_PORT": "tcp://10.0.0.7:5555", "IMPALA_SEED": "9", "SEED": "9"}
    assert load(None, kubernetes) == load()
    assert load(None, {"IMPALA__OPTIMISER__LEARNING_RATE": "1e-4"}).optimiser.learning_rate == 1e-4
    assert load(None, {"IMPALA__ENV__FULL_ACTION_SET": "true"}).env.full_action_set


# -------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch_szie", "32"], "--batch_szie: unknown key; did you mean batch_size?"),
        (["--loss.learning_rate", "1"], "did you mean optimiser.learning_rate"),
        (["--discount", "0.9"], "did you mean loss.discount?"),
        (["--batch_size", "-3"], "--batch_size = '-3': allowed is greater than or equal to 1"),
        (["--batch_size", "many"], "--batch_size = 'many': allowed is a valid integer"),
        (["--batch_size", "32.5"], "--batch_size = '32.5': allowed is a valid integer"),
        (["--batch_size"], "--batch_size: a value is missing"),
        (["--seed=" + "9" * 30], "--seed"),
        (["--optimiser.learning_rate", "nan"], "--optimiser.learning_rate = 'nan'"),
        (["--optimiser.learning_rate", "inf"], "--optimiser.learning_rate = 'inf'"),
        (["--optimiser.learning_rate", "0"], "allowed is greater than 0"),
        (["--loss.discount", "1.01"], "allowed is less than or equal to 1"),
        (["--actor.num_envs", "7"], "--actor.num_envs = '7': allowed is a multiple of 2"),
        (["--optimiser.name", "sgd"], "allowed is 'rmsprop', 'rmsprop_tf' or 'adam'"),
        (["--env.full_action_set=perhaps"], "--env.full_action_set = 'perhaps'"),
        (["--wire.learner_bind", "localhost:5555"], "--wire.learner_bind = 'localhost:5555'"),
        (["--wire.learner_endpoints", "tcp://a:1"], "--wire.learner_endpoints: unknown key"),
        (["--wire.learner_host", "tcp://a"], "--wire.learner_host = 'tcp://a'"),
        (["--wire.learner_host", ""], "--wire.learner_host = ''"),
        (["--learners", "0"], "--learners = '0': allowed is greater than or equal to 1"),
        (
            ["--learner.min_learners", "0"],
            "--learner.min_learners = '0': allowed is greater than or equal to 1",
        ),
        (["--paramserver.learner_lease_s", "0.9"], "allowed is greater than or equal to 1"),
        (["--run_id", "a b"], "--run_id = 'a b'"),
        (["--ops.port", "65536"], "allowed is less than or equal to 65535"),
        (["--preset", "impla"], "preset = 'impla': did you mean impala?"),
        (["--no-seed"], "unknown key"),
        (["--no-env.full_action_set=true"], "unknown key"),
        (["train"], "'train' is not a flag; allowed is --key value"),
        (["-x"], "'-x' is not a flag"),
        (["--"], "'--' is not a flag"),
        (["--env.kwargs", "{rows: "], "env.kwargs"),
    ],
)
def test_a_wrong_flag_is_named_with_its_value_and_what_is_allowed(flags: list[str], told: str) -> None:
    message = complaint(*flags)
    assert told in message
    assert "\n" not in message


def test_a_wrong_element_of_a_list_is_named_by_its_place() -> None:
    told = complaint("--tasks", "[catch, {id: catch, kwargs: 3}]")
    assert told == "tasks.1.kwargs = 3: allowed is an object"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--learner.queue_capacity", "31"],
            "learner.queue_capacity = 31: a batch with 32 fresh rollouts can never fill; allowed is",
        ),
        (
            ["--total_steps", "639"],
            "less than one update; allowed is at least unroll_length x batch_size / (1 + replay.ratio) = 640",
        ),
        (
            ["--actors", "200", "--learner.max_policy_lag", "199"],
            "learner.max_policy_lag = 199: actors x actor.num_envs = 6400 environments finish 200 batches",
        ),
        (["--replay.ratio", "2"], "replay.ratio = 2: batch_size = 32 cannot be"),
        (["--replay.ratio", "2"], "such as 30 or 33"),
        (["--replay.ratio", "7", "--replay.capacity", "639"], "replay.capacity = 639: less than one batch"),
        (["--replay.ratio", "7", "--replay.recurrent_state", "recomputed"], "without network.lstm"),
        (
            ["--replay.ratio=7", "--lstm", "--replay.recurrent_state=recomputed", "--replay.burn_in=20"],
            "replay.burn_in = 20: leaves nothing to train on; allowed is less than unroll_length = 20",
        ),
        (["--popart.min_sigma", "2"], "allowed is less than or equal to 1"),
        (["--popart.max_sigma", "0.5"], "allowed is greater than or equal to 1"),
        (
            ["--paramserver.hold_s", "30"],
            "paramserver.hold_s = 30.0: allowed is less than half of paramserver.seat_lease_s = 30.0",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags: list[str], told: str) -> None:
    assert told in complaint(*flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--learner.queue_capacity", "32"],
        ["--total_steps", "640"],
        ["--actors", "200", "--learner.max_policy_lag", "200"],
        ["--paramserver.hold_s", "14.9"],
        ["--paramserver.learner_lease_s", "1"],
        ["--wire.learner_host", "10.0.0.7"],
        ["--wire.learner_host", "learner-0.impala-learner"],
        ["--wire.learner_host", "fd00::1%eth0"],
    ],
)
def test_the_last_settings_that_do_not_contradict_each_other_are_accepted(flags: list[str]) -> None:
    load(flags=flags)


def test_a_wrong_variable_is_named_as_it_was_written() -> None:
    told = complaint(environment={"IMPALA__BATCH_SIZE": "x"})
    assert told.startswith("IMPALA__BATCH_SIZE = 'x': allowed is a valid integer")
    assert complaint(environment={"IMPALA__BATCHSIZE": "8"}).startswith(
        "IMPALA__BATCHSIZE: unknown key; did you"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("batch_size: '32'", "batch_size = '32': allowed is a valid integer"),
        ("batch_size: 32.0", "batch_size = 32.0"),
        ("batch_size: true", "batch_size = True"),
        ("batch_size: null", "batch_size = None"),
        ("env: catch", "env = 'catch'"),
        ("env: {id: 7}", "env.id = 7: allowed is a valid string"),
        ("env: {idd: catch}", "env.idd = 'catch': unknown key; did you mean env.id"),
        ("learning_rate: 1", "learning_rate = 1: unknown key; did you mean optimiser.learning_rate"),
        ("optimiser: {learning_rate: .nan}", "optimiser.learning_rate"),
        ("preset: [impala]", "preset = ['impala']"),
        ("seed: 1\nseed: 2", "key 'seed' stands twice"),
        ("env: {id: a, id: b}", "key 'id' stands twice"),
        ("- seed", "allowed is a mapping of keys to values"),
        ("seed: [", "run.yaml"),
        ("seed: !!python/object/apply:os.system [false]", "run.yaml"),
        ("seed: 2020-01-01", "seed = '2020-01-01': allowed is a valid integer"),
        ("1: 2", "unknown key"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    message = complaint(file=write(tmp_path / "run.yaml", text))
    assert told in message
    assert "\n" not in message


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "batch_size: 0\nseed: -1\nloss: {discount: 2, gamma: 1}\n")
    lines = complaint(file=file).splitlines()
    assert len(lines) == 4
    assert {line.partition(" = ")[0] for line in lines} == {
        "batch_size",
        "seed",
        "loss.discount",
        "loss.gamma",
    }


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert complaint(file=tmp_path / "none.yaml") == (
        f"configuration file {tmp_path / 'none.yaml'}: No such file or directory"
    )
    assert "Is a directory" in complaint(file=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert str(tmp_path / "binary.yaml") in complaint(file=tmp_path / "binary.yaml")


# --------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--preset", "torchbeast", "--env", "catch", "--env.kwargs", "{rows: 8, name: x, slow: null}"],
        ["--tasks", "catch,recall", "--learners", "3", "--learner.min_learners", "2"],
    ],
)
def test_a_dumped_configuration_is_the_same_again(tmp_path: Path, flags: list[str]) -> None:
    config = load(flags=flags)
    assert validate(dump(config)) == config
    assert load(write(tmp_path / "a.json", json.dumps(dump(config)))) == config
    assert load(write(tmp_path / "b.yaml", yaml.safe_dump(dump(config)))) == config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(load(), "seed", 2)  # noqa: B010  (mypy would refuse the plain spelling)


def test_every_knob_is_documented_and_can_be_set_to_its_default_by_its_flag() -> None:
    default = load()
    for key, value, text in describe():
        assert len(text) > 3, key
        decoded: Any = json.loads(value)
        spelled = decoded if isinstance(decoded, str) else value
        assert load(flags=[f"--{key}={spelled}"]) == default, key


def test_the_schema_knows_every_section_and_refuses_unknown_keys() -> None:
    document = schema()
    assert set(RunConfig.model_fields) == set(document["properties"])
    assert document["additionalProperties"] is False
    assert all(section["additionalProperties"] is False for section in document["$defs"].values())


def test_importing_the_configuration_imports_nothing_heavy() -> None:
    program = "import sys, services.config; print([m for m in ('torch', 'zmq', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        ([], 20),
        # 640 rollouts are 20 batches of 32, 40 of 16, 320 of 2; never fewer than 20
        (["--batch_size", "64"], 20),
        (["--batch_size", "16"], 40),
        (["--batch_size", "2"], 320),
        (["--batch_size", "2", "--learner.max_policy_lag", "20"], 20),
        # 64 in unrolls + 2 + 2 + 100 in sockets for each actor, 64 queued + 64 laid out; of which twice
        (["--actors", "1"], 20),  # 168 + 128 = 296, and 320 are fresh enough anyway
        (["--actors", "2"], 29),  # 2 x 168 + 128 = 464
        (["--actors", "4"], 50),  # 4 x 168 + 128 = 800
        (
            ["--actors", "4", "--wire.receive_queue", "64"],
            66,
        ),  # 4 x 230 + 128 = 1048, where 40 was not enough
        # two learners take 64 at once, and each actor has a connection to both: 8 x 272 + 256 = 2432
        (["--actors", "8", "--learners", "2"], 76),
        # 200,000 steps are held, and an update takes 4 fresh rollouts of 20 steps each
        (["--replay.ratio", "7"], 2500),
        (["--replay.ratio", "7", "--replay.capacity", "640"], 160),
    ],
)
def test_no_rollout_is_stale_that_a_healthy_fleet_may_have_under_way(flags: list[str], limit: int) -> None:
    config = load(flags=flags)
    assert config.max_policy_lag(config.actors, config.learners) == limit


def test_the_lag_bound_follows_the_fleet_unless_it_is_given() -> None:
    started_alone = load(flags=["--actors", "1", "--learners", "1"])
    started_with_all = load(flags=["--actors", "8", "--learners", "2"])
    for config in (started_alone, started_with_all):
        assert config.max_policy_lag(actors=4, learners=1) == 50
        assert config.max_policy_lag(actors=8, learners=2) == 76
    assert load(flags=["--learner.max_policy_lag", "20"]).max_policy_lag(actors=256, learners=3) == 20


def test_derived_figures() -> None:
    config = load(flags=["--unroll_length", "10", "--batch_size", "4"])
    assert config.steps_per_update == 40
    assert config.queue_capacity == 8
    assert load(flags=["--learner.queue_capacity", "100"]).queue_capacity == 100
    assert configuration.ENVIRONMENT_PREFIX == "IMPALA__"
