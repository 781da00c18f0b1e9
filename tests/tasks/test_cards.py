import json
from pathlib import Path

import pytest

from trainer.errors import ConfigError, DataError
from trainer.tasks.cards import load_tasks
from trainer.tasks.spec import TaskSpec

CARD = {"family": "classification", "labels": ["no", "yes"]}


def make(folder: Path, files: tuple[str, ...] = ("train.jsonl", "dev.jsonl"), **card: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"name": folder.name, **CARD, **card}))
    for name in files:
        (folder / name).write_text("")
    return folder


def names(specs: list[TaskSpec]) -> list[str]:
    return [spec.name for spec in specs]


def test_every_way_to_name_folders(tmp_path: Path) -> None:
    for name in ("b_two", "a_one", "c_three"):
        make(tmp_path / "data" / name)
    (tmp_path / "data" / "unlabeled").mkdir()
    (tmp_path / "data" / "README.md").write_text("")
    everything = ["a_one", "b_two", "c_three"]
    assert names(load_tasks(["data"], base=tmp_path)) == everything
    assert names(load_tasks([str(tmp_path / "data")])) == everything
    assert names(load_tasks(["data/*"], base=tmp_path)) == everything
    assert names(load_tasks(["d*"], base=tmp_path)) == everything
    assert names(load_tasks(["data/c_three", "data/[ab]_*"], base=tmp_path)) == ["c_three", "a_one", "b_two"]
    assert names(load_tasks(["data/b_two/task.json"], base=tmp_path)) == ["b_two"]
    assert names(load_tasks(["data"], exclude=["a_one", "*three"], base=tmp_path)) == ["b_two"]


def test_sources_become_absolute(tmp_path: Path) -> None:
    make(tmp_path / "beside", files=("train.csv", "validation.jsonl.gz", "test.parquet", "train.md"))
    (tmp_path / "shared.txt").write_text("")
    make(tmp_path / "named", files=("x.jsonl",), train="x.jsonl", dev="../shared.txt", test="hub:a/b:c@test")
    inline = TaskSpec(name="inline", family="causal_lm", train="shared.txt", dev="hub:a/b")
    beside, named, written = load_tasks(["beside", "named", inline], base=tmp_path)
    assert (beside.train, beside.dev, beside.test) == tuple(
        str(tmp_path / "beside" / name) for name in ("train.csv", "validation.jsonl.gz", "test.parquet")
    )
    assert (named.train, named.dev, named.test) == (
        str(tmp_path / "named" / "x.jsonl"),
        str(tmp_path / "shared.txt"),
        "hub:a/b:c@test",
    )
    assert (written.train, written.dev, written.test) == (str(tmp_path / "shared.txt"), "hub:a/b", None)


def test_bookkeeping_of_cards_is_dropped(tmp_path: Path) -> None:
    make(tmp_path / "one", family="regression", labels=None, single_text=True, notes="n", splits={}, source={})
    make(tmp_path / "two", family="multiple_choice", labels=None, num_labels=5)
    one, two = load_tasks(["one", "two"], base=tmp_path)
    assert one.family.value == "regression"
    assert two.num_labels is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("data/on", r"tasks\[0\]: no folder .*data/on \(did you mean 'one'\?\)"),
        ("nowhere/x", r"tasks\[0\]: no folder"),
        ("data/z*", r"tasks\[0\]: 'data/z\*' matches nothing"),
        ("data/e*", r"tasks\[0\]: 'data/e\*' matches 1 files or folders but no folder with a task.json"),
        ("data/empty", r"tasks\[0\]: .*empty is no task folder and holds none"),
    ],
)
def test_entries_that_name_nothing(tmp_path: Path, entry: str, message: str) -> None:
    make(tmp_path / "data" / "one")
    (tmp_path / "data" / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        load_tasks([entry], base=tmp_path)


def test_excluding_a_family(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "two", family="seq2seq", labels=None)
    assert names(load_tasks(["*"], exclude=["family:seq2seq"], base=tmp_path)) == ["one"]
    with pytest.raises(ConfigError, match=r"did you mean 'family:seq2seq'"):
        load_tasks(["*"], exclude=["family:seq2sq"], base=tmp_path)


def test_excludes_that_match_nothing_or_everything(tmp_path: Path) -> None:
    make(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"exclude: 'onne' matches no task \(did you mean 'one'\?\)"):
        load_tasks(["one"], exclude=["onne"], base=tmp_path)
    with pytest.raises(ConfigError, match="exclude: leaves no task"):
        load_tasks(["one"], exclude=["*"], base=tmp_path)


def test_the_same_name_twice(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "two", name="one")
    with pytest.raises(ConfigError, match=r"task 'one' is there twice: .*/one and .*/two"):
        load_tasks(["one", "two"], base=tmp_path)
    with pytest.raises(ConfigError, match="task 'one' is there twice"):
        load_tasks(["one", "*"], base=tmp_path)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"lables": ["x"]}, r"one/task\.json: unknown key 'lables' \(did you mean 'labels'\?\)"),
        ({"family": "clasification"}, r"one/task\.json: family: .*'classification'"),
        ({"labels": None}, r"one/task\.json: task 'one': a classification task needs `labels`"),
        ({"metric": "rouge_l"}, "metric 'rouge_l' does not fit family classification"),
        ({"name": "../escape"}, r"one/task\.json: name: "),
        ({"train": "gone.jsonl"}, r"one/task\.json: train: .*gone\.jsonl: no such file"),
        ({"train": "task.md"}, r"one/task\.json: train: .*task\.md: not a kind of file"),
        ({"dev": "dev.jsonl"}, r"one/task\.json: no rows to train on"),
    ],
)
def test_bad_cards(tmp_path: Path, card: dict[str, object], message: str) -> None:
    make(tmp_path / "one", files=("train.jsonl", "dev.jsonl", "task.md"), **card)
    with pytest.raises(DataError, match=message):
        load_tasks(["one"], base=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"name": "x",}', r"task\.json:2: bad JSON: .* at column"),
        ("[]", "a card is one JSON object, not a list"),
        (b"\xff\xfe", "cannot be read as JSON"),
    ],
)
def test_cards_that_are_no_json(tmp_path: Path, text: str | bytes, message: str) -> None:
    make(tmp_path / "one")
    (tmp_path / "one" / "task.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=message):
        load_tasks(["one"], base=tmp_path)


def test_files_beside_a_card_must_be_clear(tmp_path: Path) -> None:
    make(tmp_path / "one", files=("train.jsonl", "train.csv.gz"))
    make(tmp_path / "two", files=("dev.jsonl",))
    with pytest.raises(DataError, match=r"several files for split train: train\.csv\.gz, train\.jsonl"):
        load_tasks(["one"], base=tmp_path)
    with pytest.raises(DataError, match="no rows to train on; give `train`, or put a train"):
        load_tasks(["two"], base=tmp_path)


def test_a_declaration_in_the_recipe_is_the_recipes_fault(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("")
    spec = TaskSpec(name="lm", family="masked_lm", train="corpus.tx")
    with pytest.raises(ConfigError, match=r"tasks\[0\] \('lm'\): train: .*no such file.*did you mean 'corpus.txt'"):
        load_tasks([spec], base=tmp_path)
    with pytest.raises(ConfigError, match=r"tasks\[0\] \('lm'\): no rows to train on"):
        load_tasks([TaskSpec(name="lm", family="masked_lm")], base=tmp_path)
