"""Config: good files, bad files with the words their errors must contain, the command line, round trip and hash."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.lab.commands import main as cli
from jaxprune.lab.recipe import config as lab
from jaxprune.lab.recipe import reference
from jaxprune.lab.recipe.config import (
    ConfigError,
    Distribution,
    Duration,
    Granularity,
    Published,
    config_hash,
    dump,
    load,
)

FULL = """
name = "quickstart"
seeds = [0, 1]
[data]
name = "mnist"
data_dir = "/data"
validation = 0
[model]
name = "mlp"
widths = [300, 100]
dropout = 0.2
[train]
duration = "20 epochs"
batch_size = 64
optimizer = "sgd"
learning_rate = 1
decay = "cosine"
momentum = 0.9
weight_decay = 1e-4
[prune]
how = "gradual"
criterion = "taylor"
granularity = {name = "block", rows = 4, cols = 2}
distribution = {name = "global", floor = 0.01}
select = ["*/kernel"]
sparsity = 0.9
duration = "0.5 epochs"
update_every = "1 step"
[finetune]
duration = "300 steps"
[sparse]
format = "bcsr"
[checkpoint]
every = "1 epoch"
keep = 1
"""

# What follows the name, path of a field in the result, its value.
GOOD = [
    ("", "prune.sparsity", 0.9),
    ("", "seeds", (0,)),
    ("", "finetune.learning_rate", 1e-4),
    ("finetune.batch_size = 8", "finetune.duration", Duration(10, "epochs")),
    ("train.learning_rate = 1", "train.learning_rate", 1.0),
    ("train.optimizer = 'sgd'\ntrain.momentum = 0", "train.momentum", 0.0),
    ("train.duration = '1 step'", "train.duration", Duration(1, "steps")),
    ("model.widths = []", "model.widths", ()),
    ("model.name = 'lenet_5'", "model.name", "lenet_5"),
    ("prune = {how = 'iterative', sparsity = 0.5, rounds = 2}", "prune.rounds", 2),
    ("prune = {how = 'iterative', levels = [0.5, 0.9]}", "prune.sparsity", None),
    ("prune = {how = 'iterative', sparsity = 0.5, groups = [['a*'], ['b*']]}", "prune.groups", (("a*",), ("b*",))),
    ("model = {dropout = 0.5, adjust_dropout = true}", "model.adjust_dropout", True),
    ("distill.share = 0.5", "distill.temperature", 4.0),
    ("published = [{who = 'A', removed = 0.5}]", "published", (Published(who="A", removed=0.5),)),
    ("prune = {sparsity = 0.5, granularity = 'input'}", "prune.granularity", Granularity(name="input")),
    ("prune = {sparsity = 0.5, distribution = 'erk'}", "prune.distribution", Distribution(name="erk")),
    ("prune.distribution = {name = 'nm', n = 2, m = 4}", "prune.distribution.m", 4),
    ("prune = {sparsity = 0.5, distribution = {name = 'nm', n = 2, m = 4}}", "prune.sparsity", 0.5),
    ("prune.distribution = {name = 'threshold', t = 0.03}", "prune.sparsity", None),
    ("prune.distribution = {name = 'sigma_threshold', k = 1}", "prune.distribution.k", 1.0),
    ("prune.distribution = {name = 'by_rule', rules = {'a/*' = 0.9}}", "prune.distribution.rules", {"a/*": 0.9}),
]

# What follows the name, text that the message must contain.
BAD = [
    ("prune.sparsty = 0.9", "prune.sparsty: unknown key, did you mean sparsity?"),
    ("trian.batch_size = 3", "trian: unknown key, did you mean train?"),
    ("sparsity = 0.5", "sparsity: unknown key, did you mean prune.sparsity?"),
    ("checkpoint.zzz = 1", "checkpoint.zzz: unknown key, expected one of every, keep"),
    ("prune = {sparsity = 0.5, granularity = {name = 'block', rows = 1, colls = 1}}", "granularity.colls: unknown key"),
    ("train.batch_size = '3'", 'train.batch_size: expected a valid integer, arrived "3"'),
    ("train.batch_size = 3.0", "train.batch_size: expected a valid integer, arrived 3.0"),
    ("train.batch_size = true", "train.batch_size: expected a valid integer, arrived true"),
    ("train.batch_size = 0", "train.batch_size: expected greater than or equal to 1, arrived 0"),
    ("train.learning_rate = '3'", 'train.learning_rate: expected a valid number, arrived "3"'),
    ("train.learning_rate = true", "train.learning_rate: expected a valid number, arrived true"),
    ("train.learning_rate = 0", "train.learning_rate: expected greater than 0, arrived 0"),
    ("train.learning_rate = nan", "train.learning_rate: expected a finite number"),
    ("train.optimizer = 'adma'", "expected 'sgd', 'adam' or 'adamw', arrived \"adma\", did you mean \"adam\"?"),
    ("train.duration = 20", 'train.duration: expected a duration such as "20 epochs" or "500 steps", arrived 20'),
    ("train.duration = '1.5 steps'", 'arrived "1.5 steps"'),
    ("train.duration = '-1 epochs'", 'arrived "-1 epochs"'),
    ("checkpoint.every = '0 epochs'", 'checkpoint.every: expected a duration above 0, arrived "0 epochs"'),
    ("checkpoint.keep = 0", "checkpoint.keep: expected greater than or equal to 1"),
    ("train = 3", "train: expected a table, arrived 3"),
    ("data.data_dir = 2024-01-01", 'data.data_dir: expected a valid string, arrived "2024-01-01"'),
    ("data.shift = -1", "data.shift: expected greater than or equal to 0, arrived -1"),
    ("data.shift = 9", "data.shift: expected less than or equal to 8, arrived 9"),
    ("data.validation = 10", "data.validation: expected a fraction in [0, 1), arrived 10, did you mean 0.1?"),
    ("seeds = []", "seeds: expected distinct seeds, at least one, arrived []"),
    ("seeds = [1, 1]", "seeds: expected distinct seeds, at least one, arrived [1, 1]"),
    ("seeds = [0, -1]", "seeds.1: expected greater than or equal to 0, arrived -1"),
    ("seeds = [4294967296]", "seeds.0: expected less than 4294967296"),
    ("seeds = 3", "seeds: expected an array, arrived 3"),
    ("seeds = [true]", "seeds.0: expected a valid integer, arrived true"),
    ("model = {name = 'lenet_5', widths = [3]}", 'model.widths: only for name = "mlp", here name = "lenet_5"'),
    ("train.momentum = 0.9", 'train.momentum: only for optimizer = "sgd", here optimizer = "adam"'),
    ("prune = {sparsity = 0.5, rounds = 3}", 'prune.rounds: only for how = "iterative", here how = "one-shot"'),
    ("prune = {sparsity = 0.5, duration = '1 step'}", 'or "regrow" or "splice", here how = "one-shot"'),
    ("prune = {sparsity = 0.5, update_every = '1 step'}", 'prune.update_every: only for how = "gradual"'),
    ("prune = {sparsity = 0.5, levels = [0.5]}", 'prune.levels: only for how = "iterative", here how = "one-shot"'),
    ("prune = {how = 'iterative', levels = [0.9, 0.5]}", "prune.levels: expected sparsities that rise from round"),
    (
        "prune = {how = 'iterative', levels = [0.5], sparsity = 0.9}",
        "prune.sparsity: has no effect beside prune.levels",
    ),
    ("prune = {how = 'iterative', levels = [0.5], rounds = 9}", "prune.rounds: has no effect beside prune.levels"),
    ("prune = {how = 'iterative', sparsity = 0.5, groups = [[]]}", "prune.groups.0: expected patterns of leaf names"),
    (
        "prune = {how = 'iterative', sparsity = 0.5, select = ['a'], groups = [['a']]}",
        "prune.groups: has no effect beside prune.select",
    ),
    ("prune = {how = 'iterative', sparsity = 0.5, freeze = false}", "prune.freeze: only for prune.groups"),
    ("prune = {how = 'iterative', sparsity = 0.5, in_turn = true}", "prune.in_turn: only for prune.groups"),
    (
        "prune = {how = 'iterative', sparsity = 0.5, groups = [['a']], patience = 2}",
        "prune.patience: only for prune.in_turn",
    ),
    (
        "prune = {how = 'iterative', sparsity = 0.5, growth = 1.5}",
        'prune.growth: only for distribution "threshold" or "sigma_threshold"',
    ),
    (
        "prune = {how = 'iterative', distribution = {name = 'threshold', t = 0.1}, growth = 0.5}",
        "prune.growth: expected a factor of at least 1",
    ),
    ("model.adjust_dropout = true", "model.adjust_dropout: has no effect without dropout"),
    ("distill.share = 1", "distill.share: expected a fraction in [0, 1), arrived 1"),
    ("prune.sparsity = 90", "prune.sparsity: expected a fraction in [0, 1), arrived 90, did you mean 0.9?"),
    ("prune.sparsity = 1", "prune.sparsity: expected a fraction in [0, 1), arrived 1"),
    ("prune.how = 'gradual'", 'prune.sparsity: missing, distribution "global" needs it'),
    ("prune.distribution = {name = 'threshold', t = 1}\nprune.sparsity = 0.5", "prune.sparsity: has no effect with"),
    ("prune.distribution = 'nm'", 'prune.distribution.n: missing, name = "nm" needs it'),
    (
        "prune.distribution = {name = 'nm', n = 4, m = 2}",
        "prune.distribution: `NM(n, m)` keeps n of m, with 0 < n <= m; got NM(4, 2).",
    ),
    (
        "prune.distribution = {name = 'erk', floor = 0.1}",
        'distribution.floor: only for name = "global", here name = "erk"',
    ),
    ("prune.distribution = {name = 'by_rule', rules = {'a.*' = 90}}", 'rules."a.*": expected a fraction in [0, 1)'),
    ("prune.distribution = {name = 'by_rule', rules = {a = true}}", "rules.a: expected a valid number, arrived true"),
    ("prune.distribution = {name = 'by_rule', rules = {a = 'erk'}}", 'prune.sparsity: missing, distribution "erk"'),
    ("prune.distribution = 'unifrm'", 'did you mean "uniform"?'),
    ("prune.distribution = 0.9", "prune.distribution: expected a table, arrived 0.9"),
    ("prune.granularity = 'block'", 'prune.granularity.rows: missing, name = "block" needs it'),
    ("seeds = [", "no valid TOML: "),
    ("seeds = = 3", "(at line 2, column 9)"),
]


@pytest.fixture
def write(tmp_path: Path):
    def to_file(text: str) -> Path:
        path = tmp_path / "experiment.toml"
        path.write_text(text, "utf-8")
        return path

    return to_file


def problems(path: Path | str, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, words)
    return str(caught.value).splitlines()


def pick(config: object, path: str) -> object:
    for step in path.split("."):
        config = getattr(config, step)
    return config


@pytest.mark.parametrize(("text", "path", "value"), GOOD)
def test_good_files(write, text, path, value):
    config = load(write(f"name = 'x'\n{text}"))
    assert pick(config, path) == value
    assert load(write(dump(config))) == config


def test_every_key_of_the_schema(write):
    config = load(write(FULL))
    assert config.prune.granularity == Granularity(name="block", rows=4, cols=2)
    assert config.prune.duration == Duration(0.5, "epochs")
    assert config.data.validation == 0.0
    assert isinstance(config.train.learning_rate, float)
    assert isinstance(config.finetune, lab.Phase)
    assert load(write(dump(config))) == config
    with pytest.raises(ValueError, match="frozen"):
        config.prune.sparsity = 0.5


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_files_say_what_is_wrong(write, text, message):
    path = write(f"name = 'x'\n{text}")
    lines = problems(path)
    assert any(message in line for line in lines), lines
    assert all(line.startswith(f"{path}: ") for line in lines)


def test_all_problems_at_once_one_line_each(write):
    lines = problems(write("nam = 'x'\n[train]\nbatch_size = 'a\\nb'\nmomentum = 2\n[prune]\nsparsty = 0.1"))
    said = [re.search(r"toml: (\S+): ", line)[1] for line in lines]
    assert sorted(said) == ["nam", "name", "prune.sparsity", "prune.sparsty", "train.batch_size", "train.momentum"]


@pytest.mark.parametrize("name", ["a b", "", "a/b", "a\\n", "ä"])
def test_name_is_fit_for_a_folder(write, name):
    assert problems(write(f'name = "{name}"'))[0].partition(": name: ")[2].startswith("expected letters")


def test_unreadable_files(tmp_path):
    assert problems(tmp_path / "no.toml") == [f"{tmp_path}/no.toml: cannot be read: No such file or directory"]
    assert problems(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]
    (tmp_path / "latin").write_bytes(b"name = '\xe4'")
    assert "no valid TOML: 'utf-8' codec" in problems(tmp_path / "latin")[0]


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--prune.sparsity", "0.95"], "prune.sparsity", 0.95),
        (["--prune.sparsity=0.95"], "prune.sparsity", 0.95),
        (["--prune.sparsity", "0.5", "--prune.sparsity", "0.6"], "prune.sparsity", 0.6),
        (["--seeds=[0,1,2]", "--model.widths", "[32, 16]"], "model.widths", (32, 16)),
        (["--train.optimizer", "adamw"], "train.optimizer", "adamw"),
        (["--train.duration", "3 epochs"], "train.duration", Duration(3, "epochs")),
        (["--train.duration", '"3 epochs"'], "train.duration", Duration(3, "epochs")),
        (["--data.data_dir", ""], "data.data_dir", ""),
        (["--data.data_dir=/a=b"], "data.data_dir", "/a=b"),
        (["--prune.granularity.name", "input"], "prune.granularity.name", "input"),
        (["--prune.distribution.floor", "0.1"], "prune.distribution", Distribution(floor=0.1)),
        (["--checkpoint.keep", "7"], "checkpoint.keep", 7),
    ],
)
def test_overrides(write, words, path, value):
    base = "name = 'x'\n[prune]\nsparsity = 0.9\ngranularity = 'element'\ndistribution = 'global'\n"
    assert pick(load(write(base), words), path) == value


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prune.sparsty", "0.9"], "--prune.sparsty: unknown key, did you mean sparsity?"),
        (["--trian.batch_size", "3"], "--trian: unknown key, did you mean train?"),
        (["--prune.sparsity=90"], "--prune.sparsity: expected a fraction in [0, 1), arrived 90, did you mean 0.9?"),
        (["--train.batch_size", "x"], '--train.batch_size: expected a valid integer, arrived "x"'),
        (["--train.batch_size=1\nkeep = 2"], '--train.batch_size: expected a valid integer, arrived "1\\nkeep = 2"'),
        (["--prune.sparsity"], "--prune.sparsity: expected a value after it"),
        (["--prune.sparsity", "--seeds=[1]"], "--prune.sparsity: expected a value after it"),
        (["stray"], "stray: expected `--path.to.key value`"),
        (["-s", "3"], "-s: expected `--path.to.key value`"),
        (["--", "3"], "--: expected `--path.to.key value`"),
        (["--seeds.x", "3"], "--seeds.x: seeds is [1] in the file, not a table"),
        (["--prune.distribution.flor", "3"], "--prune.distribution.flor: unknown key, did you mean floor?"),
    ],
)
def test_bad_overrides_are_said_as_flags(write, words, line):
    assert problems(write("name = 'x'\nseeds = [1]\nprune.sparsity = 0.9"), *words) == [line]


def test_durations():
    assert [Duration.parse(text).steps(30) for text in ("3 steps", "2 epochs", "0.5 epochs", "1 step")] == [
        3,
        60,
        15,
        1,
    ]
    assert Duration.parse("0.001 epochs").steps(10) == 0
    for text in ("1 step", "2 steps", "0 epochs", "0.5 epochs", "0.00001 epochs", "1 epoch", "100000000000 steps"):
        assert str(Duration.parse(text)) == text
    for text in ("", "3", "epochs", "3 weeks", "1e3 steps", " 3 steps", "3  steps", "٣ steps", "3 steps\n"):
        with pytest.raises(ValueError, match="expected a duration"):
            Duration.parse(text)


FRACTIONS = st.floats(0, 1, exclude_max=True)
DURATIONS = st.builds("{} {}".format, st.integers(1, 10**6), st.sampled_from(["steps", "epochs"]))
RULES = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1),
    FRACTIONS | st.sampled_from([Distribution(name="erk"), Distribution(name="nm", n=2, m=4)]),
    min_size=1,
)
DISTRIBUTIONS = (
    st.builds(Distribution, floor=FRACTIONS) | st.builds(lambda r: Distribution(name="by_rule", rules=r), RULES)
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # beartype draws which items it checks
@given(
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, unique=True),
    data_dir=st.text(st.characters(codec="utf-8")),
    widths=st.lists(st.integers(1, 10**9)),
    train=st.fixed_dictionaries({"learning_rate": st.floats(1e-300, 1e300), "duration": DURATIONS}),
    distribution=DISTRIBUTIONS,
    sparsity=FRACTIONS,
)
def test_round_trip(tmp_path_factory, seeds, data_dir, widths, train, distribution, sparsity):
    prune = lab.Prune(distribution=distribution, sparsity=sparsity)
    config = lab.Config(
        name="x",
        seeds=seeds,
        data=lab.Data(data_dir=data_dir),
        model=lab.Model(widths=widths),
        train=train,
        prune=prune,
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(dump(config), "utf-8", newline="")
    again = load(path)
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert list(again.prune.distribution.options.get("rules", ())) == list(distribution.options.get("rules", ()))


def test_hash_ignores_what_changes_no_result(write):
    def of(text: str, *words: str) -> str:
        return config_hash(load(write(text), words))

    base = of("name = 'x'")
    assert re.fullmatch("[0-9a-f]{8}", base)
    assert base == of("seeds = [0]\nname = 'x'\n[train]\nlearning_rate = 0.001\nduration = '20 epochs'")
    assert base == of("name = 'x'\nprune = {distribution = 'global', sparsity = 0.9}")
    assert base == of("name = 'y'\ncheckpoint.keep = 5\ndata.data_dir = '/tmp'")
    assert of(FULL) == of("\n".join(re.sub(r"(?m)^(batch_size.*)\n(opt.*)", r"\2\n\1", FULL).splitlines()))
    others = [
        of("name = 'x'", *words)
        for words in (["--seeds=[1]"], ["--data.validation=0"], ["--data.shift=1"], ["--sparse.format=dense"])
    ]
    assert len({base, *others}) == 5


def test_hash_sees_the_order_of_rules(write):
    rules = "name = 'x'\nprune.distribution = {{name = 'by_rule', rules = {{{}}}}}".format
    one, two = (config_hash(load(write(rules(text)))) for text in ("'*' = 0.9, a = 0.5", "a = 0.5, '*' = 0.9"))
    assert one != two


def test_hash_knows_a_period_given_from_one_that_follows_the_length(write):
    """What was not given is still named as it was: long stages compute the same."""
    gradual = 'name = "x"\n[prune]\nhow = "gradual"\nsparsity = 0.5\n'
    hashes = [config_hash(load(write(gradual + more))) for more in ("", 'update_every = "100 steps"')]
    assert hashes[0] != hashes[1]
    assert hashes[0] == "0359483c"
    assert "update_every" not in dump(load(write(gradual)))


def test_hash_is_the_same_tomorrow():
    """Run folders carry it: a change of this value makes finished runs start anew, so change it knowingly."""
    assert config_hash(lab.Config(name="x")) == "14fb9ccd"


# ---------------------------------------------------------------- the reference


def test_the_reference_is_that_of_the_types(capsys):
    """Written anew by `jaxprune keys > experiments/CONFIG.md`."""
    assert cli.main(["keys"]) == 0
    text = capsys.readouterr().out
    assert (Path(__file__).parents[2] / "experiments/CONFIG.md").read_text("utf-8") == text
    sections = {part.splitlines()[0]: part for part in text.split("\n## ")[1:]}
    keys = {title: set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) for title, part in sections.items()}
    tables = {"`[train]`": lab.Phase, "`[prune]`": lab.Prune, "`[store]`": lab.Store, "`[model]`": lab.Model}
    for title, table in tables.items():
        assert keys[title] == set(table.model_fields) - {"granularity", "distribution"}
    assert not re.search(r"0x|<|Annotated|NoneType|\| any\b", re.sub(r"`[^`]*`|< \w|->", "", text))


@pytest.mark.parametrize(
    ("section", "row"),
    [
        ("`[train]`", r'| `momentum` | a fraction in [0, 1) | `0.9` | `optimizer` = `"sgd"` |'),
        ("`[train]`", r'| `duration` | `"20 epochs"`, `"500 steps"` | `"20 epochs"` |  |'),
        ("`[data]`", r"| `shift` | an integer ≥ 0 and ≤ 8 | `0` |  |"),
        ("`[prune]`", r'| `learning_rate` | a number > 0 |  | `how` = `"gradual"`, `"iterative"`, '),
        (
            "`[prune.distribution]`",
            r"| `rules` | a table: pattern of leaf names to a fraction in [0, 1) or a ",
        ),
        ("`[store]`", r'| `bits` | an integer ≥ 1 and ≤ 8 | `4` | `quantize` = `"codebook"` |'),
        ("`[[published]]`", r"| `accuracy` | a number ≥ 0 and ≤ 1 |  |  |"),
        ("At the top", r"| `name` | letters, digits and . _ - | needed |  |"),
    ],
)
def test_a_key_says_its_type_its_default_and_with_what_it_goes(section, row):
    parts = reference.markdown().split("\n## ")
    [part] = [part for part in parts if part.startswith(section)]
    assert row in part
