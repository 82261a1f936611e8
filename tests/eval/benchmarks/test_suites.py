"""What suites.yaml says, and that mistakes in it are named."""

import pytest
import yaml
from places import ROOT

from hovle.eval.benchmarks.report import results_table
from hovle.eval.benchmarks.suites import SUITES_FILE, load_suites


@pytest.fixture
def suites():
    return load_suites()


def test_the_papers_suite_has_seventeen_benchmarks_at_twelve_tiles(suites):
    suite = suites.suite("paper")
    assert (len(set(suite.benchmarks)), suite.max_tiles, suite.limit) == (17, 12, None)
    assert "our choice" in suites.benchmark("mmstar").note


def test_the_offline_suite_leaves_the_tile_limit_to_the_model(suites):
    assert suites.suite("offline").max_tiles is None


def test_what_needs_a_judge_is_not_comparable_without_one(suites):
    judged = [benchmark for benchmark in suites.benchmarks.values() if benchmark.judge]
    assert {benchmark.name for benchmark in judged} == {"mmbench", "mmvet", "hallusion", "mathvista"}
    for benchmark in judged:
        assert not benchmark.comparable
        assert benchmark.judged().comparable == (benchmark.name != "mmbench")  # on the dev split with a judge, too
        assert benchmark.judged().key == "OPENAI_API_KEY"
        assert benchmark.judged().task != benchmark.task
        assert "judge" in benchmark.judged().note
    assert suites.benchmark("mmbench").judged().note.startswith("dev split; ")
    assert suites.benchmark("mmbench").judged().scale == 1  # percent, as the judged task gives it


PUBLISHED = """
| | MMB | MMMU | MM-Vet | SEED-I | POPE | HallB | TextVQA | SQA-I | GQA | AI2D | DocVQA | ChartQA | InfoVQA | OCRBench |
| HoVLE | 71.9 | 33.7 | 44.3 | 70.7 | 87.6 | | 66.0 | 94.8 | 60.9 | | | | | |
| HoVLE-HD | 73.3 | 32.2 | 43.8 | 70.9 | 87.4 | 38.4 | 70.9 | | | 73.0 | 86.1 | 78.6 | 55.7 | 740 |
| InternVL2-2B | | | | | | | 73.4 | | | | 86.9 | 76.2 | | 784 |
| Mono-InternVL | 65.5 | 33.7 | 40.1 | 67.4 | | 34.8 | 72.6 | 93.6 | 59.5 | 68.6 | 80.0 | 73.7 | 43.0 | 767 |
| Qwen2-VL-2B | 74.9 | 41.1 | 49.5 | | | 41.7 | 79.7 | | | 74.7 | 90.1 | 73.5 | 65.5 | 809 |
"""  # noqa: E501 - as it stands there
"""The table of published scores at hand, as it stands there; empty cells are in no table we have."""

COLUMNS = {
    "MMB": "mmbench",
    "MMMU": "mmmu",
    "MM-Vet": "mmvet",
    "SEED-I": "seed",
    "POPE": "pope",
    "HallB": "hallusion",
    "TextVQA": "textvqa",
    "SQA-I": "scienceqa",
    "GQA": "gqa",
    "AI2D": "ai2d",
    "DocVQA": "docvqa",
    "ChartQA": "chartqa",
    "InfoVQA": "infovqa",
    "OCRBench": "ocrbench",
}


@pytest.fixture(scope="module")
def published() -> dict[tuple[str, str], str]:
    """Benchmark and model -> what the table prints; "" where it prints nothing."""
    lines = [[cell.strip() for cell in line[2:-1].split("|")] for line in PUBLISHED.strip().splitlines()]
    heads, *rows = lines
    return {(COLUMNS[head], row[0]): cell for row in rows for head, cell in zip(heads[1:], row[1:], strict=True)}


def test_published_scores_are_those_of_the_table_and_no_others(suites, published):
    expected = {key: float(cell) for key, cell in published.items() if cell}
    assert len(expected) == 47
    found = {
        (name, model): value for name, each in suites.benchmarks.items() for model, value in each.published.items()
    }
    assert found == expected


def test_what_is_not_published_is_printed_as_that(suites, published):
    """Every cell of the paper's suite, as the results page and eval/README.md print it."""
    paper = suites.suite("paper").benchmarks
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")
        for line in results_table({}, suites, dict.fromkeys(paper, "no data")).splitlines()
    }
    document = (ROOT / "eval" / "README.md").read_text()
    num_unpublished = 0
    for name in paper:
        title = suites.benchmark(name).title
        cells = [published.get((name, model), "") or "not published" for model in suites.models]
        assert [cell.removesuffix(" |") for cell in rows[title][3:]] == cells, name
        assert f"| {title} | `{suites.benchmark(name).task}` | {' | '.join(cells)} |" in document, name
        num_unpublished += cells.count("not published")
    assert num_unpublished == 17 * 5 - 47


@pytest.mark.parametrize(
    ("name", "max_tiles", "is_local_copy", "reasons"),
    [
        ("pope", 12, False, []),
        ("pope", None, False, ["the model's own limit of tiles, the published scores have 12"]),
        ("pope", 6, False, ["at most 6 tiles, the published scores have 12"]),
        ("pope", 12, True, ["a local copy of the data, which nobody has compared with the published ones"]),
        ("easy_vqa", None, False, []),
        ("easy_vqa", 12, False, ["at most 12 tiles, the suite offline has the model's own"]),
        ("vqav2_val", 3, True, []),
    ],
)
def test_other_tiles_and_data_are_departures(suites, name, max_tiles, is_local_copy, reasons):
    assert suites.departures(name, max_tiles, is_local_copy) == reasons


def test_another_judge_than_the_harnesss_is_a_departure(suites):
    own = {"model": "the harness's", "service": "the harness's"}
    assert suites.departures("mmvet", 12, False, own) == []
    [reason] = suites.departures("mmvet", 12, False, {**own, "model": "tiny"})
    assert reason == "the judge is not the harness's: model tiny, service the harness's"


@pytest.mark.parametrize("name", ["infovqa", "docvqa", "mmbench"])
def test_scores_of_another_split_are_not_comparable(suites, name):
    assert not suites.benchmark(name).comparable


def test_the_papers_suite_comes_first_for_benchmarks_of_several(suites):
    assert next(iter(suites.suites)) == "paper"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["benchmarks"]["pope"].update(colour=1), "benchmark pope: unknown colour"),
        (lambda content: content["benchmarks"]["mmvet"]["judge"].update(price=1), "judge of mmvet: unknown price"),
        (lambda content: content["benchmarks"]["pope"].update(units="weight"), "units .weight. must be none or of"),
        (
            lambda content: content["benchmarks"]["seed"].update(adapt="all"),
            "adapt .all. must be of pictures_only, whole_dec",
        ),
        (lambda content: content["benchmarks"]["mmvet"]["judge"].update(adapt="no"), "mmvet: adapt .no. must be of"),
        (lambda content: content["benchmarks"]["pope"].update(published={"GPT": 1}), "scores of GPT, unknown under"),
        (lambda content: content["suites"]["ocr"]["benchmarks"].append("cats"), "suite ocr names cats"),
        (lambda content: content["suites"]["ocr"].update(tiles=3), "suite ocr: unknown tiles"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, change, message):
    content = yaml.safe_load(SUITES_FILE.read_text())
    change(content)
    (tmp_path / "suites.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        load_suites(tmp_path / "suites.yaml")


def test_an_unknown_suite_is_named_with_the_known_ones(suites):
    with pytest.raises(ValueError, match="no suite named 'best'; there are paper, ocr, quick, offline"):
        suites.suite("best")


def test_a_name_that_is_no_benchmark_of_ours_is_a_task_of_the_harness(suites):
    benchmark = suites.benchmark("vqav2_val")
    assert (benchmark.task, benchmark.comparable, benchmark.units) == ("vqav2_val", False, "none")
