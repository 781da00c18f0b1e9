"""Cuts the small tasks shipped in this folder out of a larger collection of converted public data sets.

Owns: which tasks ship, how many rows, and the notices their licences ask for. Run by hand, never by a test or a
command; the same input gives the same bytes:

    python data/make.py COLLECTION

COLLECTION holds a folder a task with `task.json`, `train.jsonl.gz` and `dev.jsonl.gz`. Only data sets whose own
repository states a licence that permits redistribution are listed here.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
DEV_ROWS = 400
INPUT_COLUMNS = ("text", "text_a", "text_b", "context", "question", "choices", "source")

CC_BY_3 = "https://creativecommons.org/licenses/by/3.0/"
CC_BY_4 = "https://creativecommons.org/licenses/by/4.0/"
CC_BY_SA_4 = "https://creativecommons.org/licenses/by-sa/4.0/"
APACHE = "http://www.apache.org/licenses/LICENSE-2.0 (full text: LICENSE at the root of this repository)"
MIT = "MIT (full text below)"


class Cut(NamedTuple):
    """One shipped task. `holder` is the copyright line of an MIT licence; `upstream` says what the texts come from."""

    name: str
    rows: int
    licence: str
    upstream: str
    holder: str = ""


CUTS = (
    Cut("clickbait", 2000, MIT, "Headlines of news sites, collected by the authors.",
        "[2016] [Abhijnan Chakraborty, Bhargavi Paranjape, Sourya Kakarla, Niloy Ganguly]"),
    Cut("clinc150", 6000, CC_BY_3, "Queries written by crowd workers for the data set."),
    Cut("csabstruct", 2500, APACHE, "Sentences of abstracts of computer-science papers."),
    Cut("cad_nli", 4000, APACHE, "Pairs of SNLI (CC BY-SA 4.0) and their revisions by crowd workers."),
    Cut("perspectrum_stance", 4000, CC_BY_SA_4, "Claims and perspectives of debate sites and crowd workers."),
    Cut("comve_a", 4000, CC_BY_SA_4, "Statements written by crowd workers for the data set."),
    Cut("ecare", 3000, MIT, "Questions written by crowd workers for the data set.", "2022 HIT-SCIR: Social Prediction"),
    Cut("qamr", 4000, MIT, "Sentences of Wikipedia and Wikinews, questions by crowd workers.", "2017 Julian Michael"),
    Cut("complex_lcp", 3000, CC_BY_4, "Sentences of the World English Bible, Europarl and CRAFT; crowd ratings."),
    Cut("emobank_valence", 3000, CC_BY_SA_4, "Sentences of MASC and SemEval-2007 headlines; crowd ratings."),
    Cut("disfl_qa", 3000, CC_BY_4, "Questions of SQuAD 2.0 (CC BY-SA 4.0), made disfluent by annotators."),
)  # fmt: skip

MIT_TEXT = """
MIT License

Copyright (c) {holder}

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def input_key(row: Row) -> str:
    """Hash of everything a model is shown. Choices are a set: swapping them doesn't make a new question."""
    shown = {c: sorted(row[c]) if c == "choices" else row[c] for c in INPUT_COLUMNS if c in row}
    text = json.dumps(shown, sort_keys=True, ensure_ascii=False).casefold()
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def read(path: Path) -> list[Row]:
    """The rows of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def choose(rows: Iterable[Row], most: int, taken: set[str]) -> list[Row]:
    """At most `most` rows with distinct inputs that are not in `taken`, in the order of their input's hash."""
    fresh: dict[str, Row] = {}
    for row in rows:
        key = input_key(row)
        if key not in taken:
            fresh.setdefault(key, row)
    return [fresh[key] for key in sorted(fresh)[:most]]


def write(path: Path, rows: list[Row]) -> None:
    """Gzipped JSON Lines without name or time stamp, so that the same rows are the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(text.encode())


def card(source: dict[str, Any], train: list[Row], dev: list[Row]) -> dict[str, Any]:
    """The source's card with what was cut."""
    dropped = ("rows_dropped_in_conversion", "exact_duplicates")
    kept = {key: value for key, value in source.items() if key not in dropped}
    cut = (
        f"Cut: {len(train)} of {source['splits']['train']} training rows and {len(dev)} of {source['splits']['dev']} "
        "dev rows, the first by SHA-256 of the input, repeated inputs once; no dev input stands in train."
    )
    notes = f"{source['notes']} {cut}".strip()
    return {**kept, "splits": {"train": len(train), "dev": len(dev)}, "notes": notes}


def notice(cut: Cut, source: dict[str, Any], made: dict[str, Any]) -> str:
    """Attribution, licence and the statement of changes that Apache-2.0 and the Creative Commons licences require."""
    home = source["source"]
    text = (
        f"{cut.name}\n\n"
        f"Data:     {source['citation']}\n"
        f"Source:   {home['repo']}\n"
        f"          commit {home['commit']}, {', '.join(home['paths'])}\n"
        f"Texts:    {cut.upstream}\n"
        f"Licence:  {source['licence']}\n"
        f"          {cut.licence}\n"
        f"Changes:  converted to JSON Lines. {made['notes']}\n"
    )
    if cut.licence == CC_BY_SA_4:
        text += "          These changed files are under the same licence.\n"
    return text + (MIT_TEXT.format(holder=cut.holder) if cut.holder else "")


def make(cut: Cut, collection: Path, out: Path) -> None:
    """Write the folder of one task."""
    source = json.loads((collection / cut.name / "task.json").read_text("utf-8"))
    train = choose(read(collection / cut.name / "train.jsonl.gz"), cut.rows, set())
    dev = choose(read(collection / cut.name / "dev.jsonl.gz"), DEV_ROWS, {input_key(row) for row in train})
    folder = out / cut.name
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl.gz", train)
    write(folder / "dev.jsonl.gz", dev)
    made = card(source, train, dev)
    (folder / "task.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (folder / "NOTICE").write_text(notice(cut, source, made), "utf-8")


README = """# Small tasks

Real labelled data to try Sett with, cut from public data sets by `make.py`. `make quickstart` trains on them; any
recipe names a folder here, or `data/*`. `disfl_qa` is generation: for encoder-decoders and decoders.

| task | family | train / dev | licence | data |
|---|---|---|---|---|
{table}

A folder holds `train.jsonl.gz`, `dev.jsonl.gz`, the card `task.json` and `NOTICE`: source and commit, authors, licence
and what was changed. Dev rows come from the dev split as published (or as the card's notes say), and no input of them
stands in train.

**Licences.** Sett's own licence (Apache-2.0) does not cover these data: each task stays under the licence in its
`NOTICE`. The cuts of CC BY-SA data are themselves under CC BY-SA 4.0. The texts say what their authors wrote, which is
not always true or kind. Numbers on these cuts can't be compared with published ones, which use whole data sets.
"""


def readme(out: Path) -> str:
    """The README of this folder, its table read off the cards."""
    lines = []
    for cut in CUTS:
        made = json.loads((out / cut.name / "task.json").read_text("utf-8"))
        rows = f"{made['splits']['train']} / {made['splits']['dev']}"
        data = f"[{made['citation']}]({made['source']['repo']})"
        lines.append(f"| {cut.name} | {made['family']} | {rows} | {made['licence']} | {data} |")
    return README.format(table="\n".join(lines))


def main() -> None:
    """Cut every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", type=Path)
    collection = parser.parse_args().collection
    out = Path(__file__).resolve().parent
    for cut in CUTS:
        make(cut, collection, out)
    (out / "README.md").write_text(readme(out), "utf-8")


if __name__ == "__main__":
    main()
