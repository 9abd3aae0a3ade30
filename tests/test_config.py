"""A recipe is a set of defaults, cast as flags are; what is wrong ends in one line that says what to do."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from thinkclearly.data.options import DataArguments
from thinkclearly.editing.settings import SettingOverrides
from thinkclearly.recipe import LEFT_OUT, RecipeParser
from thinkclearly.training.clear import ClearArguments
from thinkclearly.training.grpo import GrpoArguments
from thinkclearly.training.methods import parse_options
from thinkclearly.training.options import LoraArguments, ModelArguments, RunArguments, effective_recipe

ROOMS = [ModelArguments, LoraArguments, DataArguments, ClearArguments, SettingOverrides]


@pytest.fixture(autouse=True)
def without_deepspeed():
    """A refused DeepSpeed file stays transformers' global configuration, half built."""
    yield
    unset_hf_deepspeed_config()


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parse(*argv, kinds=ROOMS):
    return RecipeParser(kinds, prog="thinkclearly train").parse(list(argv))


def error_of(capsys, *argv, kinds=ROOMS):
    with pytest.raises(SystemExit) as stop:
        parse(*argv, kinds=kinds)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(recipe):
    path = recipe("lora_r: 32\nlora_alpha: 64\nclear_weight: 0.5\n")
    _, lora, _, clear, _ = parse(path, "--lora_alpha", "48")
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, clear.clear_weight) == (32, 48, 0.05, 0.5)
    assert parse("--lora-r", "4")[1].lora_r == 4
    assert parse()[1] == LoraArguments()


def test_scientific_notation_is_a_number(recipe):
    _, _, _, clear, _ = parse(recipe("clear_head_lr: 2e-4\nclear_weight: 1\n"))
    assert clear.clear_head_lr == 2e-4 and type(clear.clear_weight) is float
    (training,) = parse(recipe("learning_rate: 2e-4"), kinds=[RunArguments])
    assert training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", False), ("1", True), ("0", False), ("no", False)]
)
def test_booleans(recipe, text, value):
    assert parse("--use_dora", text)[1].use_dora is value
    assert parse(recipe(f"use_dora: {text}"))[1].use_dora is value
    assert parse(recipe(f"use_cfg: {text}"))[4].use_cfg is value


def test_more_booleans(recipe, tmp_path):
    assert parse("--use_dora")[1].use_dora is True
    assert parse(recipe("use_dora: true"), "--use_dora", "false")[1].use_dora is False
    options = {"kinds": [RunArguments]}
    assert parse("--prediction_loss_only", "false", **options)[0].prediction_loss_only is False
    assert parse("--no_prediction_loss_only", **options)[0].prediction_loss_only is False
    assert parse(recipe("prediction_loss_only: false"), **options)[0].prediction_loss_only is False


def test_lists(recipe):
    source = "source: magicbrush\n"
    assert parse(recipe(source + "include: [scarf, blue]"))[2].include == ["scarf", "blue"]
    assert parse(recipe(source + "include: scarf"))[2].include == ["scarf"]
    found = parse(recipe(source + "include: [2, red]"))[2].include
    assert found == ["2", "red"], "words, even if they look like numbers"
    assert parse("--source", "magicbrush", "--include", "scarf", "blue")[2].include == ["scarf", "blue"]
    assert parse(recipe(source + "include: [scarf]"), "--include", "hat")[2].include == ["hat"]
    options = {"kinds": [RunArguments]}
    assert parse(recipe("report_to: none"), **options)[0].report_to == []
    assert parse(recipe("report_to: [none]"), **options)[0].report_to == []


def test_nothing_is_a_value_only_where_the_field_says_so(recipe, capsys):
    assert parse(recipe("limit: null\npath:\n"))[2].limit is None
    (training,) = parse(recipe("save_total_limit: null"), kinds=[RunArguments])
    assert training.save_total_limit is None
    assert "lora_r has no value" in error_of(capsys, recipe("lora_r:"))


@pytest.mark.parametrize("value", ["[os:system]", "os:system", "[]", "null"])
def test_a_recipe_names_no_code_that_is_run(recipe, capsys, value):
    """Recipes come with checkpoints and from others; what a run imports is for the one who starts it to say."""
    error = error_of(capsys, recipe(f"own_rewards: {value}"), kinds=[GrpoArguments])
    assert "own_rewards names code to run, so a recipe cannot hold it; give it as --own_rewards" in error


def test_the_command_line_names_code_that_is_run_and_whoever_repeats_the_run_has_to_name_it_too(recipe, capsys):
    argv = [recipe("method: grpo"), "--own_rewards", "mine:first", "mine:second"]
    options, _ = parse_options(argv, "thinkclearly train")
    assert options.method.own_rewards == ["mine:first", "mine:second"]
    effective = effective_recipe(options)
    assert effective["own_rewards"] == LEFT_OUT
    shared = recipe(yaml.safe_dump(effective))
    with pytest.raises(SystemExit):
        parse_options([shared], "thinkclearly train")
    assert "required: --own_rewards" in capsys.readouterr().err
    again, _ = parse_options([shared, "--own_rewards", "mine:first"], "thinkclearly train")
    assert again.method.own_rewards == ["mine:first"]


def test_mappings_reach_the_fields_that_take_them(recipe, capsys):
    text = "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.15}\n"
    (training,) = parse(recipe(text), kinds=[RunArguments])
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.15}
    assert "lora_r is {'a': 1}; expected one value" in error_of(capsys, recipe("lora_r: {a: 1}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank: 8", "unknown key 'lora_rank'; did you mean 'lora_r'?"),
        ("clear_wieght: 8", "did you mean 'clear_weight'?"),
        ("qqqq: 8", "unknown key 'qqqq'; see --help"),
        ("help: 8", "unknown key 'help'"),
        ("3: 8", "unknown key 3"),
        ("lora_r: eight", "lora_r is 'eight'; expected int"),
        ("lora_r: 8.5", "lora_r is '8.5'; expected int"),
        ("lora_r: [8]", "lora_r is [8]; expected one value"),
        ("lora_dropout: yes", "lora_dropout is True"),
        ("prepared_dir: off", "quote them"),
        ("use_dora: perhaps", "use_dora is 'perhaps'"),
        ("include: [[a]]", "include is [['a']]; expected a list"),
        ("include: {a: b}", "include is {'a': 'b'}"),
        ("source: magic", "source='magic'; choose from shapes, magicbrush"),
        ("clear_label: pixel", "clear_label='pixel'; choose from tokens, pixels, mask"),
        ("dtype: fp16", "dtype='fp16'"),
        ("clear_weight: 0", "clear_weight=0.0; expected a positive number"),
        ("clear_weight: .nan", "clear_weight=nan"),
        ("drop_all: 1.5", "drop_all=1.5; expected a share"),
        ("source: folder", "folder needs path"),
        ("limit: 0", "limit=0; expected 1 or more"),
        ("eval_samples: -1", "eval_samples=-1; expected 0 or more"),
        ("calibration_edits: -1", "calibration_edits=-1; expected 0 or more"),
        ("- lora_r", "expected `key: value` lines, found list"),
        ("", "found NoneType"),
        ("lora_r: [", "is not valid YAML"),
        ("a: &a [*a]", "unknown key 'a'"),
        ("include: &a [*a]", "expected a list"),
        ("lora_r: 2024-13-45", "is not valid YAML"),
        ("lora_r: !!bool 5", "is not valid YAML"),
        ("lora_r: " + "[" * 1500, "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(recipe, capsys, text, message):
    assert message in error_of(capsys, recipe(text))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"source": "shapes", "path": "photos"}, "path"),
        ({"source": "shapes", "include": ["red"]}, "include"),
        ({"source": "shapes", "shuffle": True}, "shuffle"),
        ({"source": "magicbrush", "photos_folder": "photos"}, "photos_folder"),
        ({"source": "folder", "shapes_size": 96}, "shapes_size"),
        ({"source": "folder", "turn_index": 1}, "turn_index"),
        ({"source": "sharegpt4o", "streaming": True}, "streaming"),
        ({"source": "prepared", "split": "dev"}, "split"),
        ({"source": "jsonl", "clear_label": "tokens"}, "clear_label"),
        ({"source": "jsonl", "cache_features": True}, "cache_features"),
        ({"source": "magicbrush", "path": "dev.parquet", "split": "dev"}, "split"),
    ],
)
def test_an_option_that_a_source_cannot_use_is_refused_by_name(options, name):
    path = {} if options["source"] == "shapes" else {"path": "somewhere"}
    with pytest.raises(ValueError, match=f"^{name}="):
        DataArguments(**path | options)
    DataArguments(**path | {"source": options["source"]})


@pytest.mark.parametrize("tag", ["object:builtins.open", "object/apply:os.system", "name:os.system", "module:os"])
def test_python_objects_are_refused(recipe, capsys, tmp_path, tag):
    marker = tmp_path / "executed"
    assert "is not valid YAML" in error_of(capsys, recipe(f"base_model: !!python/{tag} ['touch {marker}']"))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_rank", "8"], "unknown option --lora_rank; did you mean 'lora_r'?"),
        (["--lora", "8"], "unknown option --lora"),
        (["--clear-wieght=1"], "did you mean 'clear_weight'?"),
        (["--lora_r", "eight"], "invalid int value: 'eight'"),
        (["stray"], "unknown option stray"),
        (["--source", "magic"], "source='magic'"),
    ],
)
def test_wrong_flags_are_named(capsys, argv, message):
    found = error_of(capsys, *argv)
    assert message in found
    assert len(found.splitlines()) == 1, "the usage would hide the message"


@pytest.mark.parametrize("name", ["gone.yaml", "directory.yaml", "nul\0.yaml", "latin.yaml"])
def test_an_unreadable_recipe_is_an_error(tmp_path, capsys, name):
    (tmp_path / "directory.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"base_model: caf\xe9")
    assert name.split("\0")[0] in error_of(capsys, str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: best", "best"),
        ("log_level: loud", "log_level is 'loud'; choose from"),
        ("eval_strategy: no", "quote them"),
        ("save_strategy: sometimes", "sometimes"),
        ("deepspeed: nowhere.json", "thinkclearly train: error"),
    ],
)
def test_training_arguments_are_checked(recipe, capsys, text, message):
    assert message in error_of(capsys, recipe(text), kinds=[RunArguments])


def test_the_recipes_that_ship_are_valid(pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    recipes = (pytestconfig.rootpath / "recipes").glob("*.yaml")
    for path in sorted(
        path for path in recipes if path.stem not in ("edit", "geneval_janus_pro")
    ):  # other jobs'; see test_cli
        options, method = parse_options([str(path), "--bf16", "false", "--use_cpu", "true"], "thinkclearly train")
        assert options.model.base_model and options.training.output_dir and options.settings
        assert isinstance(options.method, method.Arguments)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help", kinds=[*ROOMS, RunArguments])
    assert stop.value.code == 0
    found = capsys.readouterr().out
    assert "--clear_weight" in found and "--learning_rate" in found and "--cfg_weight2" in found


NAMES = [name for kind in ROOMS for name in kind.__dataclass_fields__]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=3)
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=2))
RECIPES = st.one_of(
    st.text(max_size=60),
    st.dictionaries(st.sampled_from(NAMES) | SCALARS, VALUES, max_size=4).map(yaml.dump),
    st.lists(
        st.tuples(
            st.sampled_from(NAMES), st.sampled_from(["", "1", "a", "[1, a]", "!!set {a}", "!!float x", "~", "*b", "'"])
        ),
        max_size=4,
    ).map(lambda pairs: "\n".join(f"{key}: {value}" for key, value in pairs)),
)


@given(RECIPES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_recipe_or_an_error(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        parsed = parse(str(path))
    except SystemExit as stop:
        assert stop.code == 2
    else:
        assert [type(part) for part in parsed] == ROOMS
