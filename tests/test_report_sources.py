"""What a report reads: damaged, unfinished, mixed and old results folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_cases import make_records, write_figures_of_a_study, write_results

from flowprox.evaluation.plan import read_published, write_recipe
from flowprox.evaluation.report.sources import Chapter, read_chapters
from flowprox.options import EvaluatedMethod, EvaluatedProblem, EvaluationOptions, ImageOptions
from flowprox.records import RecordWriter

RECORDS = Path(__file__).parents[1] / "docs" / "evidence" / "records"
RECIPES = Path(__file__).parents[1] / "recipes" / "evaluate"


def read(*sources: Path, **options: Any) -> Chapter:
    (chapter,) = read_chapters(sources, **options)
    return chapter


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "run", make_records(), n_pictures=0)


def test_nothing_to_note_about_a_sound_run(results: Path) -> None:
    chapter = read(results)
    assert chapter.notes == [] and len(chapter.records) == 9 and chapter.name == "made"


def test_a_last_line_cut_short_is_left_out_and_noted(results: Path) -> None:
    path = results / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    chapter = read(results)
    assert len(chapter.records) == 8
    assert [note for note in chapter.notes if "cut short" in note]


def test_a_run_that_has_not_finished(results: Path) -> None:
    (results / "unfinished").touch()
    chapter = read(results)
    assert len(chapter.records) == 9
    assert [note for note in chapter.notes if "has not finished" in note]


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
    chapter = read(*parts)
    assert {record["method"] for record in chapter.records} == {"a", "b"}
    assert chapter.folders == parts and chapter.notes == []


def test_the_same_reconstruction_counts_once(results: Path, tmp_path: Path) -> None:
    other = write_results(tmp_path / "other", [{**record, "psnr": 99.0} for record in make_records()], 0)
    chapter = read(results, other)
    assert len(chapter.records) == 9 and 99.0 not in {record["psnr"] for record in chapter.records}
    assert chapter.notes == ["9 reconstructions stand in several folders; those of the folder named first are used"]


def test_folders_of_different_recipes_are_chapters(results: Path, tmp_path: Path) -> None:
    other = write_results(tmp_path / "other", make_records(recipe="another"), 0)
    old = write_results(tmp_path / "old", [{k: v for k, v in r.items() if k != "recipe"} for r in make_records()], 0)
    assert [chapter.name for chapter in read_chapters([results, other, old])] == ["made", "another", "old"]


def test_records_of_several_recipes_in_one_folder_are_chapters(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "run", [*make_records(), *make_records(recipe="another", gains={"flow": 9.0})], 0)
    first, second = read_chapters([folder])
    assert (first.name, len(first.records), second.name, len(second.records)) == ("made", 9, "another", 3)
    assert all(any("several recipes" in note for note in chapter.notes) for chapter in (first, second))


OTHER: dict[str, dict[str, Any]] = {
    "parameters": {"problems": {"denoising": {"sigma": 0.5}}},
    "options": {"options": {"n": 2}},
    "models": {"model_hashes": {"flow": "ab"}},
    "method": {"method_name": "another"},
}


@pytest.mark.parametrize("case", OTHER)
def test_records_of_another_recipe_of_the_same_name_share_no_mean(case: str, tmp_path: Path) -> None:
    own, other = make_records(model_hashes={}), make_records(**{"model_hashes": {}, **OTHER[case]})
    folders = [write_results(tmp_path / name, records, 0) for name, records in (("a", own), ("b", other))]
    chapters = read_chapters(folders)
    assert [chapter.name for chapter in chapters] == [f"made ({folder})" for folder in folders]
    assert all("a chapter apart" in chapter.notes[0] for chapter in chapters)
    both = write_results(tmp_path / "both", [*own, *({**r, "seed": 99} for r in other)], 0)
    with pytest.raises(ValueError, match=r"two recipes under one name.*report them apart"):
        read_chapters([both])


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


def test_numbers_of_a_recipe_are_read_as_evaluate_reads_them(results: Path) -> None:
    text = "problems: [{name: denoising, parameters: {sigma: 1e-1}, published: {bm3d: 2.75e1}}]"
    (results / "recipe.yaml").write_text(text)
    assert read(results).published.psnr == {("denoising-sigma0.1", "bm3d"): 27.5}


def test_a_recipe_of_a_later_version_is_still_read(results: Path) -> None:
    given = {"problems": [{"name": "denoising", "published": {"bm3d": 25.0}, "color": "blue"}]}
    (results / "recipe.yaml").write_text(yaml.safe_dump(given))
    assert read(results).published.psnr == {("denoising-sigma0.2", "bm3d"): 25.0}


@pytest.mark.parametrize("text", ["problems: [", "[]", "problems: 3", "problems: [{name: denoisin}]", "a: \xff"])
def test_a_damaged_recipe_costs_the_published_figures_only(text: str, results: Path) -> None:
    (results / "recipe.yaml").write_bytes(text.encode("latin-1"))
    chapter = read(results)
    (note,) = chapter.notes
    assert "is no recipe of flowprox evaluate" in note and not chapter.published.psnr
    with pytest.raises(ValueError, match="mend it or remove it"):
        read_chapters([results], recipe=results / "recipe.yaml")


def test_figures_of_the_smoke_scale_are_not_compared_with_published_ones(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "run", make_records(scale="smoke"), 0)
    write_recipe(_recipe(), folder / "recipe.yaml")
    chapter = read(folder)
    assert not chapter.published.psnr and "no figure here compares" in chapter.notes[0]


@pytest.mark.parametrize("name", ["asim-denoising", "asim-compressed-sensing", "asim-inpainting"])
def test_records_of_the_documentation_with_their_recipe(name: str) -> None:
    chapter = read(RECORDS / f"{name}.jsonl", recipe=RECIPES / f"{name}.yaml")
    problems = {str(record["problem"]) for record in chapter.records}
    assert problems == {problem for problem, _ in chapter.published.psnr}
    assert set(chapter.published.sources) == problems


# Drawn figures --------------------------------------------------------------------------------------------------------


def test_captions_of_drawn_figures(tmp_path: Path) -> None:
    captions = {"norm.svg": {"title": "Norms", "caption": "They fall.", "alt": "a falling line"}, "lost.svg": {}}
    chapter = read(write_figures_of_a_study(tmp_path / "study", captions))
    assert [(f.path.name, f.title, f.caption, f.alt) for f in chapter.illustrations] == [
        ("norm.svg", "Norms", "They fall.", "a falling line"),
        ("landscape.png", "landscape", "", "landscape"),
    ]
    (note,) = chapter.notes
    assert "names lost.svg, which is not there" in note


@pytest.mark.parametrize("text", ["{", "[]", '{"norm.svg": 3}'])
def test_damaged_captions(text: str, tmp_path: Path) -> None:
    folder = write_figures_of_a_study(tmp_path / "study")
    (folder / "figures/figures.json").write_text(text)
    with pytest.raises(ValueError, match=r"figures\.json .* mend it or remove it"):
        read(folder)
