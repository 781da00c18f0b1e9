import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import DataError
from trainer.tasks import raw, textfiles
from trainer.tasks.sources import RawRow, open_source

ROWS = [
    {"text": "plain", "label": "0"},
    {"text": 'two\nlines, "quoted"\tand tabbed', "label": "1"},
    {"text": "Ünïcode \u2028 emoji 🧵", "label": "1"},
]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def read(path: Path | str, split: str = "train", size: int = 2) -> list[RawRow]:
    """All rows, read as a worker process would: each chunk pickled."""
    chunks = [pickle.loads(pickle.dumps(chunk)) for chunk in open_source(str(path), split).chunks(size)]
    return [row for chunk in chunks for row in chunk.rows()]


def data(path: Path | str, split: str = "train") -> list[dict[str, Any] | None]:
    rows = read(path, split)
    assert [row.problem for row in rows] == [None] * len(rows)
    assert [row.index for row in rows] == list(range(len(rows)))
    return [row.data for row in rows]


def places(path: Path) -> list[tuple[int, str, bool]]:
    return [(row.index, row.place, row.problem is None) for row in read(path)]


def as_bytes(kind: str) -> bytes:
    if kind in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["text", "label"], delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)
        return text.getvalue().encode()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_text_kinds_round_trip(tmp_path: Path, kind: str, compression: str) -> None:
    path = tmp_path / f"train{kind}{compression}"
    path.write_bytes(COMPRESS[compression](as_bytes(kind)))
    assert data(path) == ROWS


@pytest.mark.parametrize("compression", COMPRESS)
def test_plain_text_is_a_paragraph_a_line(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"corpus.txt{compression}"
    path.write_bytes(COMPRESS[compression]("one two\n\n \u00a0\r\n three\u2028four \r\nlast".encode()))
    assert data(path) == [{"text": "one two"}, {"text": "three\u2028four"}, {"text": "last"}]
    assert [row.place.rpartition(":")[2] for row in read(path)] == ["1", "4", "5"]


def test_parquet_round_trip(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "answers": {"text": ["row"], "answer_start": [0]}, "score": i / 2} for i in range(7)]
    path = tmp_path / "dev.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    assert data(path) == rows
    assert read(path)[6].place == "dev.parquet:7"


def test_parquet_names_the_row_with_bad_text(tmp_path: Path) -> None:
    column = pa.array([b"fine", b"\xff\xfe", b"fine"]).cast(pa.binary())
    path = tmp_path / "dev.parquet"
    bad_text = pa.StringArray.from_buffers(3, *column.buffers()[1:])
    pq.write_table(pa.table({"text": bad_text}), path)
    assert places(path) == [(0, "dev.parquet:1", True), (1, "dev.parquet:2", False), (2, "dev.parquet:3", True)]


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    train = datasets.Dataset.from_list([{"text": f"row {i}", "label": i % 2} for i in range(5)], features=features)
    both = datasets.DatasetDict({"train": train, "validation": train.select([3])})
    both.save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "single")
    expected = [{"text": f"row {i}", "label": i % 2} for i in range(5)]
    assert data(tmp_path / "both") == expected
    assert data(tmp_path / "both", "dev") == [{"text": "row 3", "label": 1}]
    assert read(tmp_path / "both", "dev")[0].place == "both@validation:1"
    assert data(tmp_path / "single") == expected
    with pytest.raises(DataError, match=r"both: has no split 'test'; it has train, validation"):
        open_source(str(tmp_path / "both"), "test")
    prints = {open_source(str(tmp_path / "both"), split).fingerprint() for split in ("train", "dev")}
    assert len(prints) == 2
    assert open_source(str(tmp_path / "both"), "train").fingerprint() in prints


def test_folder_in_hub_layout(tmp_path: Path) -> None:
    """In a process of its own: `datasets` reads its cache folder once, when imported."""
    folder = tmp_path / "mine"
    (folder / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(pa.table({"text": [split, "b"]}), folder / "data" / f"{split}-00000-of-00001.parquet")
    code = (
        "import sys; from trainer.tasks.sources import open_source\n"
        "for split in ('train', 'dev'):\n"
        "    for chunk in open_source(sys.argv[1], split).chunks():\n"
        "        print([(row.place, row.data['text']) for row in chunk.rows()])\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [
        "[('mine@train:1', 'train'), ('mine@train:2', 'b')]",
        "[('mine@validation:1', 'validation'), ('mine@validation:2', 'b')]",
    ], done.stderr


def test_hub_without_network_is_a_clear_error(tmp_path: Path) -> None:
    code = (
        "from trainer.errors import DataError; from trainer.tasks.sources import open_source\n"
        "try:\n    open_source('hub:sett-tests/none:plain@train', 'train')\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("hub:sett-tests/none:plain@train: cannot be loaded from the hub: "), done.stderr
    assert "name its folder or files as the source" in done.stdout
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("uri", ["hub:", "hub:a/b/c", "hub:a b", "hub:../x/y"])
def test_bad_hub_names(uri: str) -> None:
    with pytest.raises(DataError, match="hub:OWNER/NAME"):
        open_source(uri, "train")


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "train.xlsx").write_text("")
    (tmp_path / "train.parquet.gz").write_text("")
    with pytest.raises(DataError, match=r"no such file or folder \(did you mean 'train.jsonl'\?\)"):
        open_source(str(tmp_path / "train.json"), "train")
    for name in ("train.xlsx", "train.parquet.gz"):
        with pytest.raises(DataError, match=r"not a kind of file that is read; name it \.jsonl"):
            open_source(str(tmp_path / name), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="`datasets` cannot load this folder"):
        open_source(str(tmp_path / "empty"), "train")


def test_json_places_and_problems(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "BOM"}\r\n',
        b"\r\n",
        b'{"text": "x",}\n',
        b"[1]\n",
        b"   \n",
        b'{"text": "caf\xe9"}\n',
        b"[" * 100_000 + b"\n",
        b'{"n": ' + b"9" * 5000 + b"}\n",
        b'{"text": "last"}',
    ]
    path.write_bytes(b"".join(lines))
    rows = read(path)
    assert [(row.index, row.place) for row in rows] == list(
        enumerate(f"train.jsonl:{n}" for n in (1, 3, 4, 6, 7, 8, 9))
    )
    assert [row.data for row in rows] == [{"text": "BOM"}, None, None, None, None, None, {"text": "last"}]
    problems = [row.problem or "" for row in rows]
    assert problems[1].startswith("bad JSON: ")
    assert "at column 1" in problems[1]
    assert problems[2] == "not a JSON object but a list (one object a line)"
    assert problems[3] == "not UTF-8: byte 0xe9 at byte 14 of the line"
    assert problems[4].startswith("bad JSON: ")
    assert problems[5].startswith("bad JSON: ")


def test_json_array_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('[\n{"text": "x"}\n]')
    with pytest.raises(DataError, match=r"train\.json:1: the file is one JSON array; .*jq -c"):
        read(path)


def test_csv_places_with_quoted_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(
        b'\xef\xbb\xbftext,label\r\n"a\r\nb",0\r\n\r\nc,1\r\nd\r\n"e"x,1\r\n5" disk,0\r\ncaf\xe9,1\r\n"open,1\r\n'
    )
    rows = read(path)
    assert [(row.place, row.data) for row in rows] == [
        ("train.csv:2", {"text": "a\r\nb", "label": "0"}),
        ("train.csv:5", {"text": "c", "label": "1"}),
        ("train.csv:6", None),
        ("train.csv:7", None),
        ("train.csv:8", {"text": '5" disk', "label": "0"}),
        ("train.csv:9", None),
        ("train.csv:10", None),
    ]
    assert [row.index for row in rows] == list(range(7))
    assert rows[2].problem == "1 fields where the header has 2 columns"
    assert "bad quoting" in (rows[3].problem or "")
    assert rows[5].problem == "not UTF-8: byte 0xe9 at byte 4 of the line"
    assert "bad quoting: unexpected end of data" in (rows[6].problem or "")


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "the file is empty"), ("a,b,a\n1,2,3\n", "names column 'a' twice"), ("a,\n1,2\n", "column without a name")],
)
def test_csv_header_problems(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "train.csv"
    path.write_text(content)
    (row,) = read(path)
    assert row.place == "train.csv:1"
    assert problem in (row.problem or "")


def test_csv_fields_longer_than_pythons_default_limit(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert data(path) == [{"text": "x" * 200_000}]


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_cut_off_archives_end_with_a_problem(tmp_path: Path, kind: str, compression: str) -> None:
    lines = [json.dumps({"text": os.urandom(30).hex()}) for _ in range(3000)]
    whole = COMPRESS[compression]("\n".join(lines).encode())
    path = tmp_path / f"train{kind}{compression}"
    path.write_bytes(whole[: len(whole) // 2])
    rows = read(path, size=100)
    assert rows[-1].data is None
    assert "compressed data is damaged or cut off" in (rows[-1].problem or "")
    assert all(row.problem is None for row in rows[:-1])
    path.write_bytes(b"this is no archive\n")
    (row,) = read(path)
    assert row.place == f"{path.name}:1"
    assert "compressed data is damaged or cut off" in (row.problem or "")


def test_damaged_parquet_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["x"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    (row,) = read(path)
    assert row.place == "train.parquet:1"
    assert "damaged or cut off" in (row.problem or "")


def test_endless_lines_are_skipped_with_a_problem(tmp_path: Path) -> None:
    long = textfiles.MAX_LINE_BYTES + 10
    for kind, first in ((".jsonl", '{"text": "x"}'), (".csv", "text\nx")):
        path = tmp_path / f"train{kind}"
        with path.open("w") as file:
            file.write(first + "\n" + "y" * long + "\n" + first.splitlines()[-1] + "\n")
        rows = read(path)
        assert [row.data for row in rows] == [{"text": "x"}, None, {"text": "x"}]
        assert f"line of {long + 1} bytes" in (rows[1].problem or "")
        assert rows[1].place == f"train{kind}:{first.count(chr(10)) + 2}"


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """64 MB of text through a source, in chunks, must not hold more than a few chunks."""
    path = tmp_path / "train.txt"
    path.write_bytes((b"word " * 3_200 + b"\n") * 4_000)
    tracemalloc.start()
    rows = sum(1 for chunk in open_source(str(path), "train").chunks() for _ in chunk.rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 4_000
    assert peak < 4 * raw.CHUNK_BYTES


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.csv", "t.txt"])
def test_fingerprint_follows_the_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "a"}\n')
    first = open_source(str(path), "train").fingerprint()
    os.utime(path, ns=(1, 1))
    assert open_source(str(path), "train").fingerprint() == first
    copy = tmp_path / f"copy-{name}"
    copy.write_bytes(path.read_bytes())
    assert open_source(str(copy), "train").fingerprint() == first
    path.write_bytes(b'{"text": "b"}\n')
    assert open_source(str(path), "train").fingerprint() != first


def test_fingerprint_of_a_file_too_large_to_hash_whole(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        file.truncate(raw.FULL_HASH_BYTES + 1)
    first = open_source(str(path), "train").fingerprint()
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    os.utime(path, ns=(1, 1))
    second = open_source(str(path), "train").fingerprint()
    os.utime(path, ns=(1, 2))
    assert len({first, second, open_source(str(path), "train").fingerprint()}) == 3


def test_same_bytes_read_as_another_kind_are_another_source(tmp_path: Path) -> None:
    prints = set()
    for kind in (".jsonl", ".txt", ".csv", ".tsv"):
        (tmp_path / f"t{kind}").write_text("x\n")
        prints.add(open_source(str(tmp_path / f"t{kind}"), "train").fingerprint())
    assert len(prints) == 4


PIECES = st.sampled_from(
    [b"a,b\n", b'"', b'""', b"\n", b"\r\n", b"\r", b"\t", b",", b'{"text": "x"}', b"\xef\xbb\xbf", b"\x00"]
)


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.txt", "t.jsonl.gz", "t.parquet"])
@given(pieces=st.lists(PIECES | st.binary(max_size=6), max_size=12))
@settings(max_examples=80, deadline=None)
def test_any_bytes_give_rows_or_problems_in_order(
    tmp_path_factory: pytest.TempPathFactory, name: str, pieces: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(b"".join(pieces))
    rows = read(path)
    assert [row.index for row in rows] == list(range(len(rows)))
    assert all((row.data is None) == (row.problem is not None) for row in rows)
    lines = [int(row.place.rpartition(":")[2]) for row in rows]
    assert lines == sorted(set(lines))
    assert all(1 <= line <= path.read_bytes().count(b"\n") + 1 for line in lines)
    assert all("\n" not in (row.problem or "") for row in rows)
