import json
import multiprocessing

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
    records = [{"image": "Zoë <&>\n", "psnr": 1.5, "seed": 0, "parts": [1, {"a": None}]}, {}, {"image": "caf\udce9"}]
    write(path, *records)
    assert read_records(path) == records
    assert [file.name for file in path.parent.iterdir()] == ["records.jsonl"]


def test_non_finite_numbers_become_null(path):
    write(path, {"psnr": float("inf"), "parts": [float("nan")]})
    assert read_records(path) == [{"psnr": None, "parts": [None]}]


def test_a_record_is_readable_at_once_and_stays_after_an_error(path):
    write(path, {"old": True})
    with pytest.raises(KeyError), RecordWriter(path, resume=True) as writer:
        writer.write({"new": True})
        assert read_records(path) == [{"old": True}, {"new": True}]
        raise KeyError
    assert read_records(path) == [{"old": True}, {"new": True}]
    write(path, {"other": True})
    assert read_records(path) == [{"other": True}]


def test_the_last_record_of_an_id_counts(path):
    write(path, {"id": "a", "failed": "no luck"}, {"id": "b"}, {"id": "a", "psnr": 1.0}, {"no": "id"}, {"no": "id"})
    assert read_records(path) == [{"id": "a", "psnr": 1.0}, {"id": "b"}, {"no": "id"}, {"no": "id"}]


def test_what_is_not_kept_is_removed_when_a_run_goes_on(path):
    write(path, {"id": "a"}, {"id": "b", "failed": "no luck"})
    write(path, {"id": "c"}, resume=True, keep=lambda record: "failed" not in record)
    assert read_records(path) == [{"id": "a"}, {"id": "c"}]


def _append(path, name):
    with RecordWriter(path, resume=True) as writer:
        for i in range(200):
            writer.write({"id": f"{name}{i}", "text": name * 500})


def test_several_processes_write_to_one_file(path):
    path.parent.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    records = read_records(path)
    assert {record["id"] for record in records} == {f"{name}{i}" for name in "abc" for i in range(200)}
    assert all(record["text"] == record["id"][0] * 500 for record in records)


def test_every_cut_of_the_last_line_is_recovered_and_resumed(tmp_path):
    """Wherever the last line ends, the others are read, and a resumed run goes on behind them."""
    first, last = '{"a": 1}\n', json.dumps({"name": "ä", "b": 2}, ensure_ascii=False) + "\n"
    whole = (first + last).encode()
    for cut in range(len(first), len(whole)):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole[:cut])
        kept = [{"a": 1}, {"name": "ä", "b": 2}] if cut == len(whole) - 1 else [{"a": 1}]
        if cut in (len(first), len(whole) - 1):  # nothing, or only the line end, is missing
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
    with pytest.warns(UserWarning, match="cut short"):
        write(path, {"b": 1}, resume=True)
    assert read_records(path) == [{"a": 1}, {"b": 1}]


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
    assert read_records(path) == []
