"""The data sets of recipes/muppet.yaml as the hub has them: features, and a few rows made up for each.

Features are those that the data sets declared in huggingface/datasets (October 2022).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import datasets


class Case(NamedTuple):
    """One data set: its features, rows as it has them, and the canonical rows that the recipe makes of them.

    Features are written short: a type, a tuple of class names, a list of what a list holds, a dict of fields.
    """

    features: dict[str, Any]
    rows: list[dict[str, Any]]
    expected: list[dict[str, Any]]
    dropped: dict[str, int] = {}  # noqa: RUF012 - never changed


def texts(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, "string")


def one_text(column: str, classes: tuple[str, ...], label: str = "label", **more: Any) -> Case:
    return Case(
        {column: "string", label: classes, **more},
        [{column: "A text.", label: len(classes) - 1}, {column: "B", label: 0}],
        [{"text": "A text.", "label": len(classes) - 1}, {"text": "B", "label": 0}],
    )


def two_texts(a: str, b: str, classes: tuple[str, ...] | None = None, **more: Any) -> Case:
    return Case(
        {a: "string", b: "string", **more, "label": classes or ("False", "True")},
        [{a: "First.", b: "Second.", "label": 1}, {a: "x", b: "y", "label": 0}],
        [{"text_a": "First.", "text_b": "Second.", "label": 1}, {"text_a": "x", "text_b": "y", "label": 0}],
    )


def summary(source: str, target: str, **more: Any) -> Case:
    return Case(
        {source: "string", target: "string", **more},
        [{source: "A long text.", target: "Short."}, {source: "", target: "?"}, {source: "x", target: " "}],
        [{"source": "A long text.", "target": "Short.", "references": ["Short."]}],
        {"source is missing": 1, "target is missing": 1},
    )


def lettered(question: str) -> Case:
    return Case(
        {"id": "string", question: "string", "choices": [texts("text", "label")], "answerKey": "string"},
        [
            {"id": "1", question: "Why?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}},
            {"id": "2", question: "How?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}},
        ],
        [
            {"context": "Why?", "choices": ["x", "y", "z"], "label": 2},
            {"context": "How?", "choices": ["x", "y"], "label": 0},
        ],
    )


def keyed(case: Case, *keys: str) -> Case:
    rows = [{**row, "answerKey": key} for row, key in zip(case.rows, keys, strict=True)]
    return case._replace(rows=rows)


def answer(text: str, start: int) -> dict[str, Any]:
    return {"text": text, "start": start}


NLI = ("entailment", "neutral", "contradiction")
IDX = {"idx": "int32"}
SPANS = ["start1", "start2", "end1", "end2"]
CHARS = [{"start": "int32", "end": "int32"}]
PAGE = texts("doc_source", "filename", "title", "wiki_context")
RESULT = {**texts("description", "filename", "title", "url", "search_context"), "rank": "int32"}
NAMES = texts("matched_wiki_entity_name", "normalized_matched_wiki_entity_name", "normalized_value", "type", "value")

CASES: dict[str, Case] = {
    "cola": one_text("sentence", ("unacceptable", "acceptable"), **IDX),
    "sst2": one_text("sentence", ("negative", "positive"), **IDX),
    "ag_news": one_text("text", ("World", "Sports", "Business", "Sci/Tech")),
    "imdb": one_text("text", ("neg", "pos")),
    "rotten_tomatoes": one_text("text", ("neg", "pos")),
    "yelp_polarity": one_text("text", ("1", "2")),
    "trec": one_text(
        "text", ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"), "coarse_label", fine_label=("ABBR:abb", "ABBR:exp")
    ),
    "mrpc": two_texts("sentence1", "sentence2", ("not_equivalent", "equivalent"), **IDX),
    "qqp": Case(
        {**texts("question1", "question2"), "label": ("not_duplicate", "duplicate"), **IDX},
        [
            {"question1": "Who?", "question2": "Which?", "label": 1},
            {"question1": "Who?", "question2": "", "label": 0},
            {"question1": None, "question2": "Who?", "label": 0},
        ],
        [{"text_a": "Who?", "text_b": "Which?", "label": 1}],
        {"text_b is missing": 1, "text_a is missing": 1},
    ),
    "mnli": two_texts("premise", "hypothesis", NLI, **IDX),
    "qnli": two_texts("question", "sentence", ("entailment", "not_entailment"), **IDX),
    "rte": two_texts("sentence1", "sentence2", ("entailment", "not_entailment"), **IDX),
    "wnli": two_texts("sentence1", "sentence2", ("not_entailment", "entailment"), **IDX),
    "snli": Case(
        {**texts("premise", "hypothesis"), "label": NLI},
        [{"premise": "x", "hypothesis": "y", "label": label} for label in (2, -1, 0, -1)],
        [{"text_a": "x", "text_b": "y", "label": label} for label in (2, 0)],
        {"label is -1": 2},
    ),
    "boolq": two_texts("question", "passage", **IDX),
    "multirc": Case(
        {
            **texts("paragraph", "question", "answer"),
            "idx": dict.fromkeys(["paragraph", "question", "answer"], "int32"),
            "label": ("False", "True"),
        },
        [{"paragraph": "Sue left.", "question": "Who left?", "answer": "Sue", "label": 1, "idx": {"answer": 0}}],
        [{"text_a": "Who left? Sue", "text_b": "Sue left.", "label": 1}],
    ),
    "wic": Case(
        {**texts("word", "sentence1", "sentence2"), **dict.fromkeys(SPANS, "int32"), **IDX, "label": ("False", "True")},
        [{"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "start1": 2, "label": 0}],
        [{"text_a": "bank: A bank.", "text_b": "The bank.", "label": 0}],
    ),
    "wsc": Case(
        {
            **texts("text", "span1_text", "span2_text"),
            **dict.fromkeys(["span1_index", "span2_index"], "int32"),
            **IDX,
            "label": ("False", "True"),
        },
        [{"text": "Mark said he left.", "span1_text": "Mark", "span2_text": "he", "span1_index": 0, "label": 1}],
        [{"text_a": "Mark said he left.", "text_b": "he: Mark", "label": 1}],
    ),
    "cb": two_texts("premise", "hypothesis", ("entailment", "contradiction", "neutral"), **IDX),
    "hans": two_texts(
        "premise",
        "hypothesis",
        ("entailment", "non-entailment"),
        **texts("parse_premise", "parse_hypothesis", "binary_parse_premise", "binary_parse_hypothesis"),
        **texts("heuristic", "subcase", "template"),
    ),
    "eraser_multirc": two_texts("query_and_answer", "passage", evidences=["string"]),
    "wiki_qa": two_texts("question", "answer", ("0", "1"), **texts("question_id", "document_title")),
    "scitail": Case(
        {
            **texts("sentence1_binary_parse", "sentence1_parse", "sentence1", "sentence2_parse", "sentence2"),
            "annotator_labels": ["string"],
            "gold_label": "string",
        },
        [
            {"sentence1": "x", "sentence2": "y", "gold_label": "entailment", "annotator_labels": ["entailment"]},
            {"sentence1": "x", "sentence2": "z", "gold_label": "neutral"},
        ],
        [{"text_a": "x", "text_b": "y", "label": 1}, {"text_a": "x", "text_b": "z", "label": 0}],
    ),
    "copa": Case(
        {**texts("premise", "choice1", "choice2", "question"), **IDX, "label": ("choice1", "choice2")},
        [{"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": "effect", "label": 0}],
        [{"context": "It rained. What was the effect?", "choices": ["Wet.", "Dry."], "label": 0}],
    ),
    "math_qa": Case(
        texts("Problem", "Rationale", "options", "correct", "annotated_formula", "linear_formula", "category"),
        [
            {
                "Problem": "5 ^ 4 ?",
                "options": "a ) 24 , b ) 1 , 200 , c ) rs . 625 , d ) 720 , e ) none",
                "correct": "c",
            },
            {"Problem": "4 ?", "options": "a ) 2, b ) 1, c ) 3 %, d ) a , e ) none of these", "correct": "e"},
            {"Problem": "3 ?", "options": "a )  , b ) 1 , c ) 6 , d ) 7 , e ) 8", "correct": "b"},
        ],
        [
            {"context": "5 ^ 4 ?", "choices": ["24", "1 , 200", "rs . 625", "720", "none"], "label": 2},
            {"context": "4 ?", "choices": ["2", "1", "3 %", "a", "none of these"], "label": 4},
        ],
        {"choices is missing": 1},
    ),
    "openbookqa": keyed(lettered("question_stem"), "C", "1"),
    "swag": Case(
        {
            **texts("video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source"),
            **texts("ending0", "ending1", "ending2", "ending3"),
            "label": ("0", "1", "2", "3"),
        },
        [{"startphrase": "He", **{f"ending{i}": f"does {i}." for i in range(4)}, "sent1": "?", "label": 3}],
        [{"context": "He", "choices": ["does 0.", "does 1.", "does 2.", "does 3."], "label": 3}],
    ),
    "hellaswag": Case(
        {
            **texts("activity_label", "ctx_a", "ctx_b", "ctx", "source_id", "split", "split_type", "label"),
            "ind": "int32",
            "endings": ["string"],
        },
        [{"ctx": "He", "ctx_a": "?", "endings": ["a.", "b.", "c.", "d."], "label": "2"}],
        [{"context": "He", "choices": ["a.", "b.", "c.", "d."], "label": 2}],
    ),
    "race": Case(
        {**texts("example_id", "article", "answer", "question"), "options": ["string"]},
        [
            {"article": "Sue left.", "question": "Who left?", "options": ["Al", "Sue", "Bo", "Di"], "answer": "B"},
            {"article": "Sue left.", "question": "Who left?", "options": ["Al", "", "Bo", "Di"], "answer": "A"},
        ],
        [{"context": "Who left? Sue left.", "choices": ["Al", "Sue", "Bo", "Di"], "label": 1}],
        {"choices is missing": 1},
    ),
    "commonsense_qa": keyed(lettered("question"), "C", "1")._replace(
        features={**texts("id", "question", "question_concept", "answerKey"), "choices": [texts("label", "text")]}
    ),
    "cosmos_qa": Case(
        {**texts("id", "context", "question", "answer0", "answer1", "answer2", "answer3"), "label": "int32"},
        [{"context": "I ran.", "question": "Why?", **{f"answer{i}": f"{i}." for i in range(4)}, "label": 1}],
        [{"context": "Why? I ran.", "choices": ["0.", "1.", "2.", "3."], "label": 1}],
    ),
    "arc_easy": keyed(lettered("question"), "C", "1"),
    "arc_challenge": keyed(lettered("question"), "C", "1"),
    "sciq": Case(
        texts("question", "distractor3", "distractor1", "distractor2", "correct_answer", "support"),
        [
            {"question": q, "support": s, "correct_answer": "right", **{f"distractor{i}": f"{i}" for i in (1, 2, 3)}}
            for q, s in (("What?", ""), ("How?", "So."), ("Who?", "They."))
        ],
        [
            {"context": "What?", "choices": ["right", "3", "1", "2"], "label": 0},
            {"context": "How? So.", "choices": ["1", "3", "2", "right"], "label": 3},
            {"context": "Who? They.", "choices": ["1", "right", "2", "3"], "label": 1},
        ],
    ),
    "squad": Case(
        {**texts("id", "title", "context", "question"), "answers": [{"text": "string", "answer_start": "int32"}]},
        [{"context": "Am Fluß.", "question": "Wo?", "answers": {"text": ["Fluß"], "answer_start": [3]}}],
        [{"context": "Am Fluß.", "question": "Wo?", "answers": [answer("Fluß", 3)]}],
    ),
    "natural_questions": Case(
        {
            **texts("subset", "context", "qid", "question"),
            "context_tokens": [{"tokens": "string", "offsets": "int32"}],
            "question_tokens": [{"tokens": "string", "offsets": "int32"}],
            "detected_answers": [{"text": "string", "char_spans": CHARS, "token_spans": CHARS}],
            "answers": ["string"],
        },
        [
            {
                "subset": subset,
                "context": "<P> It is 3 of 30 .",
                "question": "what is it",
                "answers": ["THREE"],
                "detected_answers": {
                    "text": [text],
                    "char_spans": [{"start": [10], "end": [10]}],
                    "token_spans": [{"start": [4], "end": [4]}],
                },
            }
            for subset, text in (("NaturalQuestionsShort", "3"), ("HotpotQA", "3"), ("NaturalQuestionsShort", "30 ."))
        ],
        [
            {"context": "<P> It is 3 of 30 .", "question": "what is it", "answers": [answer("3", 10)]},
            {"context": "<P> It is 3 of 30 .", "question": "what is it", "answers": [answer("30 .", 15)]},
        ],
        {"subset is 'HotpotQA'": 1},
    ),
    "drop": Case(
        {
            **texts("section_id", "query_id", "passage", "question"),
            "answers_spans": [texts("spans", "types")],
        },
        [
            {"passage": "Bo and Al ran 3 miles.", "question": "Who?", "answers_spans": {"spans": s, "types": t}}
            for s, t in ((["Al", "Bo"], ["span"] * 2), (["3"], ["number"]), (["1 May 1900"], ["date"]))
        ],
        [{"context": "Bo and Al ran 3 miles.", "question": "Who?", "answers": [answer("Al", 7), answer("Bo", 0)]}],
        {"answers_spans.types is 'number'": 1, "no answer in the context": 1},
    ),
    "record": Case(
        {
            **texts("passage", "query"),
            "entities": ["string"],
            "entity_spans": [{"text": "string", "start": "int32", "end": "int32"}],
            "answers": ["string"],
            "idx": {"passage": "int32", "query": "int32"},
        },
        [
            {
                "passage": "Bo ran.\n@highlight\nAl won",
                "query": "@placeholder won",
                "answers": ["Al"],
                "entities": ["Al"],
            }
        ],
        [{"context": "Bo ran.\n@highlight\nAl won", "question": "@placeholder won", "answers": [answer("Al", 19)]}],
    ),
    "hotpot_qa": Case(
        {
            **texts("id", "question", "answer", "type", "level"),
            "supporting_facts": [{"title": "string", "sent_id": "int32"}],
            "context": [{"title": "string", "sentences": ["string"]}],
        },
        [
            {
                "question": "Who?",
                "answer": found,
                "context": {"title": ["Bo", "Al"], "sentences": [["Bo has no cat.", " He ran."], ["Al won."]]},
            }
            for found in ("Al", "no", "Sue")
        ],
        [{"context": "Bo has no cat. He ran. Al won.", "question": "Who?", "answers": [answer("Al", 23)]}],
        {"answers is 'no'": 1, "no answer in the context": 1},
    ),
    "trivia_qa": Case(
        {
            **texts("question", "question_id", "question_source"),
            "entity_pages": [PAGE],
            "search_results": [RESULT],
            "answer": {**NAMES, "aliases": ["string"], "normalized_aliases": ["string"]},
        },
        [
            {
                "question": "Who?",
                "entity_pages": {"wiki_context": pages, "title": ["?"] * len(pages)},
                "answer": {"value": "The Cat", "aliases": ["The Cat", "Cats", "Cat"]},
            }
            for pages in (["Cathy had", "a Cat."], ["Nobody."])
        ],
        [{"context": "Cathy had a Cat.", "question": "Who?", "answers": [answer("Cat", 12)]}],
        {"no answer in the context": 1},
    ),
    "cnn_dailymail": summary("article", "highlights", id="string"),
    "xsum": summary("document", "summary", id="string"),
    "billsum": summary("text", "summary", title="string"),
    "aeslc": summary("email_body", "subject_line"),
    "multi_news": summary("document", "summary"),
}


def feature(short: Any) -> Any:
    match short:
        case str():
            return datasets.Value(short)
        case tuple():
            return datasets.ClassLabel(names=list(short))
        case [inner]:
            return datasets.Sequence(feature(inner))  # of fields: fields of lists, as on the hub
        case _:
            return {name: feature(inner) for name, inner in short.items()}


def filled(short: Any, value: Any) -> Any:
    """A row with the fields that the test does not name: empty lists, else null."""
    match short:
        case dict():
            return {name: filled(inner, (value or {}).get(name)) for name, inner in short.items()}
        case [dict(fields)]:
            given = value or {}
            size = max([len(listed) for listed in given.values()], default=0)
            return {n: [filled(f, x) for x in given.get(n) or [None] * size] for n, f in fields.items()}
        case [_]:
            return value or []
        case _:
            return value


def write(case: Case, file: Path) -> datasets.Features:
    """The rows as Parquet, as `push_to_hub` writes them."""
    features = datasets.Features(feature(case.features))
    rows = [filled(case.features, row) for row in case.rows]
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    return features
