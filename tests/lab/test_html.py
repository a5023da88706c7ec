"""Pages and tables: well formed, self-contained, escaped, complete, and honest about what did not come out."""

import base64
import copy
import re
from html.parser import HTMLParser

import pytest

from jaxprune.lab.report import figures, html, wording

PNG = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VOID = {"meta", "link", "img", "br"}
EVIL = "<script>alert(1)</script>\"'&|`"


def stat(*values):
    mean = sum(values) / len(values)
    return {"mean": mean, "std": (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5, "values": list(values)}


RESULT = {
    "name": "quickstart",
    "hash": "1a2b3c4d",
    "command": "jaxprune run experiments/quickstart.toml --seeds '[0, 7]'",
    "started": "2026-02-03T04:05:06+00:00",
    "finished": "2026-02-03T04:06:06+00:00",
    "seeds": [0, 7],
    "dataset": {"name": "digits", "train": 1257, "validation": 180, "test": 360},
    "accuracy": {
        "dense": stat(0.97, 0.974),
        "pruned": stat(0.41, 0.43),
        "finetuned": stat(0.968, 0.97),
        "sparse": stat(0.968, 0.97),
    },
    "sparsity": stat(0.9, 0.9),
    "overall_sparsity": stat(0.8951, 0.8951),
    "sparse": {"format": "bcoo", "agreement": {"values": [1.0, 1.0]}, "bytes": 123450, "dense_bytes": 987600},
    "leaves": [
        {"name": "layers/0/kernel", "shape": [64, 300], "weights": 19200, "nnz": 1920, "sparsity": 0.9,
         "bytes": 76800, "sparse_bytes": 23041},
        {"name": "layers/1/kernel", "shape": [300, 10], "weights": 3000, "nnz": 2999, "sparsity": 1 / 3000,
         "bytes": 12000, "sparse_bytes": 35988},
    ],
    "seconds": stat(12.0, 13.0),
}  # fmt: skip
METRICS = [
    {"seed": seed, "stage": stage, "step": step, "epoch": 1.0, "loss": 0.125, "train_accuracy": 0.99,
     "validation_accuracy": 0.9512 if stage == "train" else None, "sparsity": 0.0, "seconds": 1.0}
    for seed in (0, 7) for stage, step in (("train", 1100), ("train", 1234), ("finetune", 2468))
]  # fmt: skip
MACHINE = {"jax": "0.10.2", "cpu": "Some CPU <2 cores>"}


def changed(**paths):
    """A copy of RESULT with values replaced; `sparse__bytes=1` reaches into it."""
    result = copy.deepcopy(RESULT)
    for path, value in paths.items():
        *parents, last = path.split("__")
        place = result
        for parent in parents:
            place = place[parent]
        place[last] = value
    return result


def report(result=RESULT, metrics=METRICS, figures=None):
    return html.report_page(result, 'name = "quickstart"\n', MACHINE, metrics, figures or {"training_curve": PNG})


class Reader(HTMLParser):
    """Checks that tags balance, and collects text, tags and attributes."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.pieces = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> does not close {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.pieces.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.pieces).replace("\u00a0", " ").split())


def sweep(result=RESULT, caption="accuracy_over_kept"):
    points = [{**result, "values": {"prune.preset": name}} for name in ("snip", EVIL)]
    return html.sweep_page({**result, "title": result["name"], "points": points}, {caption: PNG})


PAGES = {
    "report": report,
    "comparison": lambda: html.comparison_page([RESULT, changed(name="b")], {"comparison": PNG}),
    "sweep": sweep,
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_page_is_one_file_that_loads_nothing(page):
    page = page()
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//\w|@import|url\(", page)
    assert not {"script", "iframe", "object", "form"} & set(reader.tags)
    loads = [value for name, value in reader.attributes if name in ("src", "href", "srcset", "background")]
    assert len(loads) == 2
    assert all(value.startswith("data:") for value in loads)
    assert base64.b64encode(PNG).decode() in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_page_suits_phone_dark_and_print(page):
    page = page()
    assert 'name="viewport"' in page
    for query in ("prefers-color-scheme: dark", "max-width: 30rem", "@media print"):
        assert query in page
    # every colour is defined; the tone is set where it is used, on cards and verdict
    assert set(re.findall(r"var\(--(\w+)\)", page)) <= {"tone", *re.findall(r"--(\w+):", page)}


def test_report_shows_every_number():
    text = Reader(report()).text
    for shown in [
        "90.0 % of the weights in the pruned leaves removed; accuracy 97.2 % dense, 96.9 % sparse.",
        "97.20 % ± 0.20 over 2 seeds", "42.00 % ± 1.00 over 2 seeds", "96.90 % ± 0.10 over 2 seeds",
        "\N{MINUS SIGN}55.20 points from dense", "\N{MINUS SIGN}0.30 points from dense",
        "Yes , the same class on all 360 test samples, for all 2 seeds.",
        "89.51 ± 0.00 % of all parameters", "987,600 bytes dense, 123,450 bytes sparse: 8.00 times smaller",
        "1,257 training, 180 validation and 360 test samples. 2 seeds (0, 7). Finished 2026-02-03 04:06 UTC.",
        "layers/0/kernel 64 x 300 19,200 1,920 90.0 % 76,800 23,041", "layers/1/kernel", "0.03 %",
        "2 leaves 22,200 4,919 77.8 % 88,800 59,029",
        "train 0 1,234 0.125 99.00 % 95.12 % 0.00 %", "fine-tune 7 2,468 0.125 99.00 % - 0.00 %",
        RESULT["command"], 'name = "quickstart"', "jax 0.10.2", "Some CPU <2 cores>", "12.5 s for each seed",
    ]:  # fmt: skip
        assert shown in text, shown
    assert "1,100" not in text  # only the last record of a stage


@pytest.mark.parametrize(
    ("agreement", "said"),
    [
        ([1.0, 357 / 360], "No , the class differs for seed 7 on 3 of 360 test samples (99.17 % agree)."),
        ([0.5, 0.9999999], "for seed 0 on 180 of 360 test samples (50.00 % agree); seed 7 on 1 of 360"),
        ([], "Not compared."),
    ],
)  # fmt: skip
def test_report_is_honest_where_sparse_is_not_masked(agreement, said):
    result = changed(sparse__agreement__values=agreement)
    page = report(result)
    assert said in Reader(page).text
    assert "Yes" not in Reader(page).text
    assert "var(--bad)" in page
    assert "var(--good)" not in page
    assert html.agreement_text(result)[0] is False
    assert re.match(r"Sparse = masked  no[,t]", html.summary_text(result).splitlines()[-1])
    assert "| yes |" not in html.summary_markdown([result])


def test_larger_is_called_larger():
    result = changed(sparse__bytes=2 * 987600)
    for text in (Reader(report(result)).text, html.summary_text(result)):
        assert "2.00 times LARGER" in text
        assert "smaller" not in text
    assert "200.0 %" in html.summary_markdown([result])


@pytest.mark.parametrize(
    ("dense", "sparse", "end"), [(8, 8, "8 bytes sparse"), (0, 0, "0 bytes sparse"), (9, 3, "3.00 times smaller")]
)
def test_sizes(dense, sparse, end):
    assert wording.size_text(dense, sparse).endswith(end)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.9, "90.0 %"), (0.99996, "99.996 %"), (0.0004, "0.04 %"), (1.0, "100.0 %"), (0, "0.0 %"),
     (1 - 1e-12, "99.9999999999 %"), (0.9999, "99.99 %"), (1.878, "187.8 %")],
)  # fmt: skip
def test_a_percentage_never_rounds_to_all_or_nothing(share, text):
    assert wording.percent(share) == text


def test_everything_from_outside_is_escaped():
    evil = changed(name=EVIL, hash=EVIL, command=EVIL, dataset__name=EVIL, sparse__format=EVIL)
    evil["leaves"][0]["name"] = EVIL
    metrics = [{**METRICS[0], "stage": EVIL}]
    page = html.report_page(evil, EVIL, {EVIL: EVIL}, metrics, {EVIL: PNG})
    reader = Reader(page)
    assert "<script" not in page
    assert reader.text.count("<script>alert(1)</script>") >= 10
    assert ("alt", EVIL) in reader.attributes
    for other in (html.comparison_page([evil, RESULT], {EVIL: PNG}), sweep(evil, EVIL)):
        assert "<script" not in other
        assert Reader(other).text.count("<script>alert(1)</script>") >= 4
        assert ("alt", EVIL) in Reader(other).attributes
    assert "<script" not in html.summary_markdown([evil])


def test_comparison_lists_every_run():
    runs = [RESULT, changed(name="harder", sparsity=stat(0.99), accuracy__sparse=stat(0.91, 0.93))]
    text = Reader(html.comparison_page(runs, {"comparison": PNG})).text
    for shown in [
        "2 runs on digits: 90.0 % to 99.0 % of the weights removed, accuracy with sparse weights 92.0 % to 96.9 %.",
        "quickstart digits 90.0 % 97.20 ± 0.20 42.00 ± 1.00 96.90 ± 0.10 96.90 ± 0.10 \N{MINUS SIGN}0.30 yes 12.5 % -",
        "harder digits 99.0 %",
        "92.00 ± 1.00 \N{MINUS SIGN}5.20",
        RESULT["command"],
    ]:
        assert shown in text, shown


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([], "No runs to compare."),
        ([RESULT], "1 run on digits: 90.0 % of the weights removed, accuracy with sparse weights 96.9 %."),
        ([RESULT, changed(dataset__name="mnist")], "2 runs on 2 data sets (digits, mnist): compare within a data set"),
    ],
)
def test_comparison_headline(results, said):
    assert said in Reader(html.comparison_page(results, {})).text


def test_a_run_without_some_stages_or_metrics_still_has_its_page():
    partial = changed(accuracy={"dense": stat(0.9), "pruned": stat(0.8), "finetuned": None}, seeds=[3], leaves=[])
    text = Reader(report(partial, metrics=[], figures={})).text
    assert "accuracy 90.0 % dense, 80.0 % pruned." in text
    assert "one seed" in text
    assert "Seed 3." in text
    assert "Fine-tuned" not in text
    assert "90.00 | 80.00 | - | - | - |" in html.summary_markdown([partial])
    assert "Fine-tuned" not in html.summary_text(partial)


def test_summary_text_is_an_aligned_table():
    first, empty, *rows = html.summary_text(RESULT).splitlines()
    assert first.startswith("quickstart 1a2b3c4d: 90.0 % of the weights")
    assert not empty
    assert dict(re.split(r" {2,}", row) for row in rows) == {
        "Dense": "97.20 ± 0.20 %",
        "Pruned": "42.00 ± 1.00 %",
        "Fine-tuned": "96.90 ± 0.10 %",
        "Sparse": "96.90 ± 0.10 %",
        "Sparsity": "90.00 ± 0.00 % of the pruned leaves",
        "Overall": "89.51 ± 0.00 % of all parameters",
        "In memory": "as bcoo, ready to run: 987,600 bytes dense, 123,450 bytes sparse: 8.00 times smaller",
        "Time": "12.5 s for each seed",
        "Sparse = masked": "yes, the same class on all 360 test samples, for all 2 seeds.",
    }
    assert len({re.search(r" {2,}(?=\S)", row).end() for row in rows}) == 1


def test_multiply_adds_stand_among_the_facts():
    text = "22,200 for one image, 4,440 with the weights left: 5.00 times fewer"
    assert text in html.summary_text(changed(macs={"dense": 22200, "left": stat(4400, 4480)}))
    assert "Multiply-adds" not in html.summary_text(RESULT)


def test_the_bytes_in_memory_and_on_disk_are_told_apart():
    """Two sizes stand side by side, and each says what it is of, on the page as on the terminal."""
    artifact = {"quantize": "none", "bytes": stat(99_000), "dense_bytes": 990_000, "accuracy": stat(0.96)}
    result = changed(artifact=artifact)
    for text in (html.summary_text(result), Reader(report(result)).text):
        said = " ".join(text.split())
        assert "In memory as bcoo, ready to run: 987,600 bytes dense, 123,450 bytes sparse: 8.00 times smaller" in said
        assert "On disk model.jaxprune, packed: weights as they are, 99,000 bytes, 10.00 times smaller" in said
        assert "Stored" not in said
    header = html.summary_markdown([RESULT]).splitlines()[0]
    assert "| In memory, of dense | From file, % | File, times smaller |" in header


@pytest.mark.parametrize("missing", [("dataset",), ("sparse",), ("dataset", "sparse", "artifact", "macs"), ("leaves",)])
def test_runs_stand_side_by_side_whatever_they_have(missing):
    lacking = {key: value for key, value in RESULT.items() if key not in missing}
    rows = html.summary_markdown([RESULT, lacking]).strip().splitlines()[2:]
    assert rows[0] != rows[1] or missing == ("leaves",)
    assert rows[1].startswith("| quickstart | ")
    assert "96.90 ± 0.10" in Reader(html.comparison_page([RESULT, lacking], {})).text
    assert figures.png(figures.comparison([RESULT, lacking])).startswith(b"\x89PNG")


def test_summary_markdown_has_one_row_a_run_whatever_its_name():
    table = html.summary_markdown([RESULT, changed(name="a|b\n`c` *d*")])
    rows = table.strip().splitlines()
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {15}
    assert rows[2].startswith(r"| quickstart | digits | 90.0 % | 97.20 ± 0.20 |")
    assert rows[3].startswith(r"| a\|b \`c\` \*d\* |")
