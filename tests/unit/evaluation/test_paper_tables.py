"""The paper's tables: its own scores give its own columns; results and logs that do not belong
together are refused."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from megatron_vico.cli.main import main
from megatron_vico.cli.table import _title_and_model
from megatron_vico.evaluation.benchmarks import ABLATIONS, TABLES
from megatron_vico.evaluation.paper_tables import Cell, Row, retention

PAPER = Path(__file__).with_name("paper_tables.tsv")


def paper_rows():
    """(table, title, scores, printed overall column, base's scores) of every row of scores."""
    base = []
    for line in PAPER.read_text().splitlines()[1:]:
        table, title, *numbers = line.split("\t")
        if title == "ratio":
            continue
        *scores, overall = (float(number.rstrip("%")) for number in numbers)
        if title.startswith("InternVL") or title == "Vanilla":
            base = scores
        yield int(table), title, scores, overall, base


def paper_row(table, title, scores, base=None):
    cells = {
        benchmark.title: Cell(score=score, standard_error=0.0)
        for benchmark, score in zip(TABLES[table], scores, strict=True)
    }
    return Row(title=title, model=title, cells=cells, base=base)


def percent(table, scores, base):
    row = paper_row(table, "row", scores, paper_row(table, "base", base))
    return 100 * retention(row, TABLES[table]).value


# Printed overall column - what the formula gives from the printed scores, where rounding differs.
# All four lie within the rounding of the scores themselves; no cell is out of reach.
DIFFERENT = {
    (1, "+ ViCO", 99.6): 99.549,
    (2, "+ ViCO", 99.2): 99.283,
    (3, "FastV", 95.9): 95.956,
    (6, "+ ViCO", 100.6): 100.656,
}


def test_the_papers_scores_give_its_retention():
    different = {}
    rows = list(paper_rows())
    for table, title, scores, overall, base in rows:
        found = percent(table, scores, base)
        if round(found, 1) != overall:
            different[table, title, overall] = round(found, 3)
        # The scores are printed to 0.1, MME to 1 (to 0.1 in Table 5): the overall column lies in
        # what they allow.
        steps = [0.05 if "." in str(score) and score < 150 else 0.5 for score in scores]
        low = percent(
            table,
            [score - step for score, step in zip(scores, steps, strict=True)],
            [score + step for score, step in zip(base, steps, strict=True)],
        )
        high = percent(
            table,
            [score + step for score, step in zip(scores, steps, strict=True)],
            [score - step for score, step in zip(base, steps, strict=True)],
        )
        assert low - 0.05 <= overall <= high + 0.05, (table, title)
    assert len(rows) == 12 + 12 + 9 + 4 + 4
    assert different == DIFFERENT


def test_the_mean_of_single_retentions_is_not_the_papers_formula():
    wrong = 0
    for _, _, scores, overall, base in paper_rows():
        ratios = [score / whole for score, whole in zip(scores, base, strict=True)]
        wrong += round(100 * sum(ratios) / len(ratios), 1) != overall
    assert wrong == 15  # of 24; four by the formula above


def test_the_papers_ratio_rows_are_means_over_benchmarks():
    rows = [line.split("\t") for line in PAPER.read_text().splitlines()[1:]]
    found = 0
    for table, title, *numbers in rows:
        if title == "ratio":
            *ratios, mean = (float(number.rstrip("%")) for number in numbers)
            assert abs(sum(ratios) / len(ratios) - mean) <= 0.051, (table, numbers)
            found += 1
    assert found == 18


class Site:
    """A folder of results and logs, written as the harnesses and the server write them."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "requests.jsonl"
        self.time = 1_750_000_000.0

    def request(self, model, request_id, *, tiles=10, compressed=0, **changes):
        self.time += 1
        plan = model.partition("@")[2]
        row = {
            "id": request_id,
            "time": self.time,
            "model": model,
            "plan": plan,
            "status": 200,
            "prompt_tokens": 50 + 256 * tiles - 192 * compressed,
            "tiles": tiles,
            "compressed_tiles": compressed,
            "visual_tokens": 256 * tiles - 192 * compressed,
            "images": [{"tiles": tiles, "compressed_tiles": compressed}],
        } | changes
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def lmms(self, model, task, metrics, requests, *, answers="A"):
        """A run of lmms-eval: its two files, from the requests that it made."""
        folder = self.folder / "lmms" / model
        folder.mkdir(parents=True, exist_ok=True)
        results = {
            "results": {task: metrics},
            "group_subtasks": {task: []},
            "configs": {task: {"test_split": "test"}},
            "n-samples": {task: {"original": 99, "effective": len(requests)}},
            "config": {"model_args": f"model={model},base_url=http://127.0.0.1/v1"},
        }
        (folder / f"1_{task}_results.json").write_text(json.dumps(results))
        samples = [
            {
                "doc_id": number,
                "filtered_resps": [answers],
                "token_counts": [{"input_tokens": row["prompt_tokens"], "output_tokens": 1}],
            }
            for number, row in enumerate(requests)
        ]
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"1_{task}_samples_{task}.jsonl").write_text(text)

    def kit(self, model, dataset, metrics, *, count, start, answer="A", **state):
        """A run of VLMEvalKit: status.json, and the predictions."""
        folder = self.folder / "kit" / model / f"T{start:.0f}_{dataset}"
        folder.mkdir(parents=True)
        rows = ["index\tanswer\tprediction", *(f"{i}\tA\t{answer}" for i in range(count))]
        (folder / "p.tsv").write_text("\n".join(rows) + "\n")
        end = self.time + 0.5
        status = {
            "model_name": model,
            "created_at": datetime.fromtimestamp(start, UTC).isoformat(),
            "datasets": {
                dataset: {
                    "status": "done",
                    "prediction_file": "p.tsv",
                    "metrics": metrics,
                    "updated_at": datetime.fromtimestamp(end, UTC).isoformat(),
                }
                | state
            },
        }
        (folder / "status.json").write_text(json.dumps(status))

    def table(self, number, *rows, harness="lmms", words="--format json"):
        command = ["table", number, *rows, "--results", str(self.folder / harness)]
        return main([*command, "--log", str(self.log), *words.split()])


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def run_lmms(site, model, *, score, compressed, task="ai2d", ids="ai2d/test/{}", **changes):
    rows = [
        site.request(
            model, ids.format(number), compressed=compressed and compressed + number % 2, **changes
        )
        for number in range(4)
    ]
    site.lmms(model, task, {"exact_match,none": score, "exact_match_stderr,none": 0.02}, rows)
    return rows


def test_lmms_results_join_their_requests(site, capsys):
    run_lmms(site, "base@none", score=0.80, compressed=0)
    run_lmms(site, "vico@vir", score=0.79, compressed=5)
    site.request("vico@vir", "ai2d/test/0", compressed=5)  # asked once more after a timeout
    site.request("vico@vir", "mmstar/val/0", compressed=9)  # of another task
    site.request("vico@vir", "ai2d/test/9", status=429)
    rows = ("vanilla=base@none", "vico=vico@vir")
    assert site.table("3", *rows) == 0
    base, vico = json.loads(capsys.readouterr().out)
    cell = vico["scores"]["AI2D"]
    assert (cell["score"], cell["standard_error"]) == (pytest.approx(79), pytest.approx(2))
    assert (cell["tiles"], cell["compressed_tiles"], cell["samples"]) == (40, 22, 4)
    assert cell["compressed_by_tile"] == pytest.approx(0.55)
    assert vico["retention"] == pytest.approx(79 / 80)
    assert vico["retention_standard_error"] == pytest.approx(
        ((2 / 80) ** 2 + (79 / 80 * 2 / 80) ** 2) ** 0.5
    )
    assert (base["retention"], base["retention_standard_error"]) == (1.0, 0.0)

    assert site.table("3", *reversed(rows), words="--format text --no-errors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == [
        "Vanilla",
        "ViCO",
        "Ratio of Compressed Patches",
    ]
    assert lines[3].split()[-1] == "98.8%*"  # one of eight benchmarks
    assert lines[4].split()[-1] == "55.0%"


def test_vlmevalkit_results_join_by_the_times_of_their_runs(site, capsys):
    for model, compressed in (("base@none", 0), ("vico@vir", 6)):
        for dataset, metrics in (
            ("OCRBench", {"Final Score Norm": 84.0 - compressed / 10}),
            ("MME", {"perception": 1700.0, "reasoning": 680.0 - compressed}),
            ("BLINK", {"split=none|Overall": 0.5}),
        ):
            start = site.time + 0.5
            for _ in range(2):
                site.request(model, "chatcmpl-1", compressed=compressed)
            site.kit(model, dataset, metrics, count=2, start=start)
    assert site.table("1", "8B=base@none", "+ ViCO=vico@vir", harness="kit") == 0
    _, vico = json.loads(capsys.readouterr().out)
    assert vico["retention"] == pytest.approx((83.4 + 2374 / 28) / (84 + 2380 / 28))
    assert vico["scores"]["MME"]["compressed_by_tile"] == pytest.approx(0.6)
    assert vico["scores"]["OCRBench"]["standard_error"] == pytest.approx((83.4 * 16.6 / 2) ** 0.5)
    words = "--format latex --no-errors"
    assert site.table("1", "8B=base@none", "+ ViCO=vico@vir", harness="kit", words=words) == 0
    shown = capsys.readouterr().out
    assert r"+ ViCO & 83.4 & - & - & - & - & 2374 &" in shown
    assert r"Ratio of Compressed Patches & 60\% & - &" in shown


def test_a_run_that_went_on_later_has_the_requests_of_both_parts(site, capsys):
    start = site.time + 0.5
    site.request("base@none", "a")
    site.kit("base@none", "OCRBench", {}, count=1, start=start, status="infer")
    start = site.time + 5.5
    site.time += 10
    site.request("base@none", "b")
    site.kit("base@none", "OCRBench", {"Final Score Norm": 50.0}, count=2, start=start)
    assert site.table("1", "8B=base@none", harness="kit") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["scores"]["OCRBench"]["samples"] == 2


def test_pruned_tokens_and_an_unmatched_random_row_are_told(site, capsys):
    run_lmms(site, "base@none", score=0.8, compressed=0, visual_tokens=2560)
    run_lmms(site, "base@fastv", score=0.7, compressed=0, visual_tokens=1280)
    run_lmms(site, "vico@random=0.3", score=0.7, compressed=2)
    run_lmms(site, "vico@vir", score=0.79, compressed=5)
    rows = ("vanilla=base@none", "fastv=base@fastv", "random_compress=vico@random=0.3")
    assert site.table("3", *rows, "vico=vico@vir", words="--format markdown") == 0
    shown = capsys.readouterr().out
    assert "| Visual Tokens Kept | - | - | - | - | - | 50% |" in shown
    assert "ViCO (random) compressed 25.0% of the tiles, ViCO 55.0%: not matched." in shown
    assert "| FastV | - | - | - | - | - | 70.0 +- 2.0 |" in shown
    assert "FastV kept 50.0% of the visual tokens, ViCO 58.8%: not matched." in shown


def error_of(site, capsys, *rows, **kwargs):
    assert site.table(*rows, **kwargs) == 2
    return capsys.readouterr().err


def test_results_and_logs_that_differ_are_named(site, capsys):
    rows = run_lmms(site, "base@none", score=0.8, compressed=0)
    ask = ("3", "vanilla=base@none")
    log = site.log.read_text()

    site.log.write_text("".join(log.splitlines(keepends=True)[:3]))
    error = error_of(site, capsys, *ask)
    assert "1_ai2d_results.json (base@none) has 4 samples" in error
    assert "requests.jsonl has 3 of its tasks" in error
    assert "ai2d/test/3" in error

    site.log.write_text(log.replace('"prompt_tokens": 2610', '"prompt_tokens": 2611', 1))
    assert "was told of 10440 prompt tokens, but" in error_of(site, capsys, *ask)

    site.log.write_text(log.replace("base@none", "other@none"))
    error = error_of(site, capsys, *ask)
    assert "no answered request of it in" in error
    assert "which has requests for other@none" in error

    site.log.write_text(log.replace("ai2d/test/", "chatcmpl-"))  # the stock client: no ids
    assert site.table(*ask) == 0
    capsys.readouterr()
    site.request("base@none", "chatcmpl-5")
    assert "4 samples, but" in error_of(site, capsys, *ask)

    site.log.write_text(log.replace('"plan"', '"plain"', 1))
    assert "request 'ai2d/test/0' has no usable 'plan'" in error_of(site, capsys, *ask)

    site.log.write_text(log)
    site.lmms(
        "base@none",
        "ai2d",
        {"exact_match,none": 0.8},
        rows,
        answers="[LMMS_EVAL_REQUEST_FAILED after 5 retries]",
    )
    assert "4 of 4 samples were scored without an answer" in error_of(site, capsys, *ask)
    assert "no result of this table" in error_of(site, capsys, "3", "vanilla=base@all")


def test_vlmevalkits_results_that_are_not_whole_are_named(site, capsys):
    ask = ("1", "8B=base@none")
    metrics = {"Final Score Norm": 50.0}
    start = site.time + 0.5
    site.request("base@none", "a")
    site.kit("base@none", "OCRBench", metrics, count=1, start=start)
    status = next(site.folder.rglob("status.json"))
    whole = json.loads(status.read_text())

    def changed(**state):
        new = json.loads(json.dumps(whole))
        new["datasets"]["OCRBench"] |= state
        status.write_text(json.dumps(new))
        return error_of(site, capsys, *ask, harness="kit")

    assert "OCRBench has no score (no judge)" in changed(metrics={}, error_message="no judge")
    assert "has no 'Final Score Norm', but ['x']" in changed(metrics={"x": 1})
    assert "run VLMEvalKit with PRED_FORMAT=tsv" in changed(prediction_file="p.xlsx")
    assert "p2.tsv" in changed(prediction_file="p2.tsv")
    whole["datasets"]["MME"] = {}
    assert "2 data sets in one run (OCRBench, MME)" in changed()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["3", "vico=a"], "Table 3 without vanilla=MODEL"),
        (["3", "vanila=a"], "did you mean 'vanilla'?"),
        (["1", "base@none"], "expected TITLE=MODEL"),
        (["own", "a=b"], "go together"),
        (["1", "a=b", "--columns", "x:y"], "go together"),
        (["own", "a=b", "--columns", "x"], "expected TASK:METRIC"),
    ],
)
def test_wrong_words_are_refused(site, capsys, words, error):
    run_lmms(site, "base@none", score=0.8, compressed=0)
    table, row, *more = words
    assert error in error_of(site, capsys, table, row, words=" ".join(more) or "--errors")


def test_a_table_of_an_own_task(site, capsys):
    rows = [site.request("a@vir", f"toy/test/{number}", compressed=4) for number in range(3)]
    site.lmms("a@vir", "toy", {"hit,none": 0.5}, rows)
    assert site.table("own", "toy=a@vir", words="--columns toy:hit --no-errors") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].split() == ["toy", "50.0", "100.0%"]
    assert shown[3].split()[-2:] == ["40%", "40.0%"]


def test_table_3_has_the_papers_rows():
    printed = [title for table, title, *_ in paper_rows() if table == 3]
    both = [title for title in ABLATIONS if not title.endswith("_default")]
    assert len(printed) == len(both) == 9


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("random=0.5=internvl@random=0.5", ("random=0.5", "internvl@random=0.5")),
        ("8B=base@none+tiles=24", ("8B", "base@none+tiles=24")),
        ("8B=base", ("8B", "base")),
    ],
)
def test_titles_and_models_may_hold_the_sign_between_them(row: str, named: tuple[str, str]) -> None:
    assert _title_and_model(row) == named
