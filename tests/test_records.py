import json

import pytest

from flowprox.records import RecordWriter, read_records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "records.jsonl"


def write(path, *records, **options):
    with RecordWriter(path, **options) as writer:
        for record in records:
            writer.write(record)


def test_what_is_written_is_read(path):
    records = [{"image": "Zoë <&>\n", "psnr": 1.5, "seed": 0, "parts": [1, {"a": None}]}, {}]
    write(path, *records)
    assert read_records(path) == records
    assert [file.name for file in path.parent.iterdir()] == ["records.jsonl"]


def test_non_finite_numbers_become_null(path):
    write(path, {"psnr": float("inf"), "parts": [float("nan")]})
    assert read_records(path) == [{"psnr": None, "parts": [None]}]


def test_a_record_is_readable_before_the_end_and_final_only_after(path):
    with RecordWriter(path) as writer:
        writer.write({"a": 1})
        assert not path.exists()
        assert read_records(path) == [{"a": 1}]
    assert path.exists()


def test_an_error_leaves_the_partial_and_the_old_file(path):
    write(path, {"old": True})
    with pytest.raises(KeyError), RecordWriter(path) as writer:
        writer.write({"new": True})
        raise KeyError
    assert read_records(path) == [{"old": True}]
    assert read_records(path.with_name("records.jsonl.partial")) == [{"new": True}]


def test_a_resumed_run_is_read_as_far_as_it_came(path):
    write(path, {"a": 1})
    with pytest.raises(KeyError), RecordWriter(path, resume=True) as writer:
        writer.write({"b": 2})
        raise KeyError
    assert read_records(path) == [{"a": 1}, {"b": 2}]


def test_every_cut_of_the_last_line_is_recovered_and_resumed(tmp_path):
    """Wherever the last line ends, the others are read, and a resumed run goes on behind them."""
    first, last = '{"a": 1}\n', json.dumps({"name": "ä", "b": 2}, ensure_ascii=False) + "\n"
    whole = (first + last).encode()
    for cut in range(len(first), len(whole)):
        path = tmp_path / f"{cut}.jsonl"
        path.with_name(path.name + ".partial").write_bytes(whole[:cut])
        kept = [{"a": 1}]
        if cut == len(first):
            assert read_records(path) == kept
            write(path, {"c": 3}, resume=True)
        elif cut == len(whole) - 1:  # only the line end is missing
            kept.append({"name": "ä", "b": 2})
            assert read_records(path) == kept
            write(path, {"c": 3}, resume=True)
        else:
            with pytest.warns(UserWarning, match="cut short"):
                assert read_records(path) == kept
            with pytest.warns(UserWarning, match="cut short"):
                write(path, {"c": 3}, resume=True)
        assert read_records(path) == [*kept, {"c": 3}]


def test_a_last_line_of_zeros_is_dropped(path):
    path.parent.mkdir()
    path.write_bytes(b'{"a": 1}\n\0\0\0\n')
    with pytest.warns(UserWarning, match="cut short"):
        assert read_records(path) == [{"a": 1}]


def test_damage_elsewhere_is_an_error_that_names_the_line(path):
    path.parent.mkdir()
    path.write_text('{"a": 1}\n[2]\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2"):
        read_records(path)


def test_no_file(path):
    with pytest.raises(FileNotFoundError, match="no records"):
        read_records(path)


def test_what_json_cannot_say_raises(path):
    with pytest.raises(TypeError), RecordWriter(path) as writer:
        writer.write({"a": object()})
    assert not path.exists()
