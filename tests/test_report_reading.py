"""What a report reads: damaged, unfinished, mixed and old results folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_cases import make_records, write_figures_of_a_study, write_results

from flowprox.evaluation.recipe_file import read_published, write_recipe
from flowprox.evaluation.report.reading import Evaluation, read_evaluations
from flowprox.evaluation_options import EvaluatedMethod, EvaluatedProblem, EvaluationOptions, ImageOptions
from flowprox.records import RecordWriter

RECORDS = Path(__file__).parents[1] / "docs" / "evidence" / "records"
RECIPES = Path(__file__).parents[1] / "recipes" / "evaluate"


def read(*sources: Path, **options: Any) -> Evaluation:
    (evaluation,) = read_evaluations(sources, **options)
    return evaluation


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "run", make_records(), n_pictures=0)


def test_nothing_to_note_about_a_sound_run(results: Path) -> None:
    evaluation = read(results)
    assert evaluation.notes == [] and len(evaluation.records) == 9 and evaluation.name == "made"


def test_a_last_line_cut_short_is_left_out_and_noted(results: Path) -> None:
    path = results / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    evaluation = read(results)
    assert len(evaluation.records) == 8
    assert [note for note in evaluation.notes if "cut short" in note]


def test_a_run_that_has_not_finished(results: Path) -> None:
    (results / "unfinished").touch()
    evaluation = read(results)
    assert len(evaluation.records) == 9
    assert [note for note in evaluation.notes if "has not finished" in note]


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"problem": "p", "method": "m"}, "record 10 lacks image"),
    "word for a number": ({"problem": "p", "method": "m", "image": "i", "psnr": "high"}, "psnr of record 10"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_record_that_is_none_is_named(case: str, results: Path) -> None:
    record, message = DAMAGE[case]
    with open(results / "records.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=message):
        read(results)


@pytest.mark.parametrize("key", ["version", "run_seed", "scale", "device"])
def test_what_differs_between_records_is_noted(key: str, tmp_path: Path) -> None:
    records = [{**record, key: "ab"[i % 2]} for i, record in enumerate(make_records())]
    (note,) = read(write_results(tmp_path / "run", records, 0)).notes
    assert "differ between records (a, b)" in note


@pytest.mark.parametrize("key", ["torch", "deepinv"])
def test_versions_of_libraries_that_differ_are_noted(key: str, tmp_path: Path) -> None:
    records = [{**record, "versions": {key: str(i % 2)}} for i, record in enumerate(make_records())]
    (note,) = read(write_results(tmp_path / "run", records, 0)).notes
    assert note.startswith(f"versions of {key} differ")


def test_exact_estimates_are_noted(tmp_path: Path) -> None:
    records = make_records()
    records[0]["psnr"] = None
    (note,) = read(write_results(tmp_path / "run", records, 0)).notes
    assert "1 estimates have no finite PSNR" in note


def test_images_that_were_tuned_on_are_noted(results: Path) -> None:
    tuning = {"problem": "denoising", "method": "flow", "options": {"a": 1}, "psnr": 1.0}
    with RecordWriter(results / "tuning.jsonl") as writer:
        writer.write({**tuning, "images": ["other"]})
    assert read(results).notes == []
    with RecordWriter(results / "tuning.jsonl", resume=True) as writer:
        writer.write({**tuning, "images": ["other", "cat"]})
    (note,) = read(results).notes
    assert "(cat)" in note and "too good" in note


# Several folders ------------------------------------------------------------------------------------------------------


def test_folders_of_one_recipe_are_one_evaluation(tmp_path: Path) -> None:
    parts = [
        write_results(tmp_path / name, make_records(gains={name: gain}), 1) for name, gain in (("a", 0.0), ("b", 1.0))
    ]
    evaluation = read(*parts)
    assert {record["method"] for record in evaluation.records} == {"a", "b"}
    assert evaluation.folders == parts and evaluation.notes == []


def test_the_same_reconstruction_counts_once(results: Path, tmp_path: Path) -> None:
    other = write_results(tmp_path / "other", [{**record, "psnr": 99.0} for record in make_records()], 0)
    evaluation = read(results, other)
    assert len(evaluation.records) == 9 and 99.0 not in {record["psnr"] for record in evaluation.records}
    assert evaluation.notes == ["9 reconstructions stand in several folders; those of the folder named first are used"]


def test_folders_of_different_recipes_are_chapters(results: Path, tmp_path: Path) -> None:
    other = write_results(tmp_path / "other", make_records(recipe="another"), 0)
    old = write_results(tmp_path / "old", [{k: v for k, v in r.items() if k != "recipe"} for r in make_records()], 0)
    assert [evaluation.name for evaluation in read_evaluations([results, other, old])] == ["made", "another", "old"]


# Published figures ----------------------------------------------------------------------------------------------------


def _recipe() -> EvaluationOptions:
    problems = [
        EvaluatedProblem("denoising", series={"sigma": [0.1, 0.2]}, published={"bm3d": [30.0, None]}, published_in="A"),
        EvaluatedProblem("inpainting", label="hole", published={"flow": 1}),
    ]
    methods = [EvaluatedMethod("tv", options={"n_iterations": 2}), EvaluatedMethod("biharmonic", "b")]
    return EvaluationOptions(ImageOptions("pictures", limit=2), problems, methods, name="mine")


def test_published_figures_and_their_source_are_read_back(tmp_path: Path) -> None:
    write_recipe(_recipe(), tmp_path / "recipe.yaml")
    published = read_published(tmp_path / "recipe.yaml")
    assert published.psnr == {("denoising-sigma0.1", "bm3d"): 30.0, ("hole", "flow"): 1.0}
    assert published.sources == {"denoising-sigma0.1": "A", "denoising-sigma0.2": "A"}


def test_a_recipe_of_a_later_version_is_still_read(results: Path) -> None:
    given = {"problems": [{"name": "denoising", "published": {"bm3d": 25.0}, "color": "blue"}]}
    (results / "recipe.yaml").write_text(yaml.safe_dump(given))
    assert read(results).published.psnr == {("denoising-sigma0.2", "bm3d"): 25.0}


@pytest.mark.parametrize("text", ["problems: [", "[]", "problems: 3", "problems: [{name: denoisin}]", "a: \xff"])
def test_a_damaged_recipe_costs_the_published_figures_only(text: str, results: Path) -> None:
    (results / "recipe.yaml").write_bytes(text.encode("latin-1"))
    evaluation = read(results)
    (note,) = evaluation.notes
    assert "is no recipe of flowprox evaluate" in note and not evaluation.published.psnr
    with pytest.raises(ValueError, match="mend it or remove it"):
        read_evaluations([results], recipe=results / "recipe.yaml")


def test_figures_of_the_smoke_scale_are_not_compared_with_published_ones(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "run", make_records(scale="smoke"), 0)
    write_recipe(_recipe(), folder / "recipe.yaml")
    evaluation = read(folder)
    assert not evaluation.published.psnr and "no figure here compares" in evaluation.notes[0]


@pytest.mark.parametrize("name", ["asim-denoising", "asim-compressed-sensing", "asim-inpainting"])
def test_records_of_the_documentation_with_their_recipe(name: str) -> None:
    evaluation = read(RECORDS / f"{name}.jsonl", recipe=RECIPES / f"{name}.yaml")
    problems = {str(record["problem"]) for record in evaluation.records}
    assert problems == {problem for problem, _ in evaluation.published.psnr}
    assert set(evaluation.published.sources) == problems


# Drawn figures --------------------------------------------------------------------------------------------------------


def test_captions_of_drawn_figures(tmp_path: Path) -> None:
    captions = {"norm.svg": {"title": "Norms", "caption": "They fall.", "alt": "a falling line"}, "lost.svg": {}}
    evaluation = read(write_figures_of_a_study(tmp_path / "study", captions))
    assert [(f.path.name, f.title, f.caption, f.alt) for f in evaluation.illustrations] == [
        ("norm.svg", "Norms", "They fall.", "a falling line"),
        ("landscape.png", "landscape", "", "landscape"),
    ]
    (note,) = evaluation.notes
    assert "names lost.svg, which is not there" in note


@pytest.mark.parametrize("text", ["{", "[]", '{"norm.svg": 3}'])
def test_damaged_captions(text: str, tmp_path: Path) -> None:
    folder = write_figures_of_a_study(tmp_path / "study")
    (folder / "figures/figures.json").write_text(text)
    with pytest.raises(ValueError, match=r"figures\.json .* mend it or remove it"):
        read(folder)
