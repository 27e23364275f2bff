import html.parser
import re

import pytest
import torch

from flowprox.data import load_image, save_image
from flowprox.evaluation.records import RecordWriter
from flowprox.evaluation.report import picture_path, summarise, truth_path, write_figures, write_report

NASTY = '<script>alert("x")</script> & $a_b$ ../up'


class Tags(html.parser.HTMLParser):
    """Collects tags; complains about any that is not closed."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def results(folder, image="face", problem="denoising", psnr=20.0):
    (folder / "images").mkdir()
    save_image(torch.rand(3, 8, 8), truth_path(folder, image))
    with RecordWriter(folder / "records.jsonl") as writer:
        for method, gain in (("measurement", 0.0), ("bm3d", 5.0), (NASTY, 7.5)):
            save_image(torch.rand(3, 8, 8), picture_path(folder, problem, image, method))
            record = {"problem": problem, "method": method, "image": image, "ssim": 0.5, "seconds": 0.25}
            writer.write({**record, "psnr": psnr + gain, "seed": 0, "version": "1"})
    return folder


def test_summary_means():
    records = [
        {"problem": "p", "method": "a", "image": "1", "psnr": 10, "ssim": 0.1, "seconds": 1.0, "group": "g"},
        {"problem": "p", "method": "a", "image": "2", "psnr": 20, "ssim": 0.3, "seconds": None, "group": "h"},
        {"problem": "p", "method": "b", "image": "1", "psnr": None, "group": "g"},
    ]
    first, second = summarise(records)
    assert first == ("p", "a", 2, 15.0, pytest.approx(0.2), 1.0, {"g": 10.0, "h": 20.0})
    assert second == ("p", "b", 1, None, None, None, {"g": None, "h": None})


def test_the_report_is_one_file_that_loads_nothing(tmp_path):
    page = write_report(results(tmp_path)).read_text(encoding="utf-8")
    tags = Tags(page)
    images = [attributes for tag, attributes in tags.found if tag == "img"]
    assert len(images) == 4
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in images)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags.found}
    outside = re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    assert "http://" not in outside and "https://" not in outside and "url(" not in outside
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    for text in ("20.00", "25.00", "27.50", "0.500", "0.250", "seed 0"):
        assert text in tags.text


def test_text_is_escaped_and_names_stay_in_the_folder(tmp_path):
    folder = results(tmp_path, image=NASTY, problem=NASTY)
    assert all(path.parent == folder / "images" for path in (truth_path(folder, NASTY), *folder.glob("images/*")))
    tags = Tags(write_report(folder, title=NASTY).read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in tags.found}
    assert NASTY in tags.text
    assert any(NASTY in attributes.get("alt", "") for tag, attributes in tags.found if tag == "img")
    assert len(write_figures(folder)) == 2


def test_the_best_of_a_column_is_marked(tmp_path):
    page = write_report(results(tmp_path)).read_text(encoding="utf-8")
    assert re.findall(r"<td class=best>([\d.]+)</td>", page)[0] == "27.50"


def test_a_missing_picture_is_named(tmp_path):
    folder = results(tmp_path)
    picture_path(folder, "denoising", "face", "bm3d").unlink()
    assert "no picture denoising--face--bm3d.png" in write_report(folder).read_text(encoding="utf-8")
    write_figures(folder)


def test_figures_are_pictures(tmp_path):
    paths = write_figures(results(tmp_path))
    assert [path.name for path in paths] == ["denoising.png", "summary.png"]
    assert all(min(load_image(path).shape[1:]) > 100 for path in paths)


def test_reports_are_reproducible(tmp_path):
    folder = results(tmp_path)
    first = [path.read_bytes() for path in (write_report(folder), *write_figures(folder))]
    assert first == [path.read_bytes() for path in (write_report(folder), *write_figures(folder))]


def test_no_records(tmp_path):
    with pytest.raises(FileNotFoundError, match="no records"):
        write_report(tmp_path)
    (tmp_path / "records.jsonl").touch()
    for write in (write_report, write_figures):
        with pytest.raises(ValueError, match="holds no record"):
            write(tmp_path)
    with pytest.raises(ValueError, match="record 1 lacks method, image"):
        summarise([{"problem": "p"}])
