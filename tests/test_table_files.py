"""Tables in files mean what they mean in pandas, whatever their format."""

import gzip

import numpy as np
import pandas as pd
import pytest

from pyroflows.density.streaming import TableFile
from pyroflows.tables import Schema

TABLE = pd.DataFrame(
    {
        "amount": [1234.5, 7.25, 99.0, 12000.0],
        "count": [1, 2, 3, 4],
        "label": ["é", "b", "c d", "b"],
        "flag": [True, False, True, True],
    }
)


def written(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


FORMATS = {
    "comma.csv": (dict(), dict()),
    "tab.tsv": (dict(sep="\t"), dict()),
    "semicolon.csv": (dict(sep=";", decimal=","), dict(decimal=",")),
    "bar.txt": (dict(sep="|"), dict()),
    "packed.csv.gz": (dict(), dict()),
    "packed.tsv.bz2": (dict(sep="\t"), dict()),
    "UPPER.CSV": (dict(), dict()),
    "utf-16.csv": (dict(encoding="utf-16"), dict(encoding="utf-16")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_text_formats(tmp_path, name):
    written_with, read_with = FORMATS[name]
    TABLE.to_csv(tmp_path / name, index=False, **written_with)
    file = TableFile(tmp_path / name, **read_with)
    assert file.names == list(TABLE)
    assert file.count() == len(TABLE)
    pd.testing.assert_frame_equal(file.read(), TABLE)


def test_a_file_reads_as_pandas_reads_it(tmp_path):
    text = "x,k\n1.5,a\n,\nNA,n/a\n2.5,NULL\n3,\n"
    path = written(tmp_path / "t.csv", text)
    pd.testing.assert_frame_equal(TableFile(path).read(), pd.read_csv(path))
    assert TableFile(path).read()["k"].isna().sum() == 4  # no label ''


def test_options_are_those_of_pandas(tmp_path):
    path = written(tmp_path / "t.csv", 'a,b,c\n"1,234.50",?,x\n"2,000.00",5,-\n')
    frame = TableFile(path, thousands=",", na_values=["?", "-"]).read()
    assert frame["a"].tolist() == [1234.5, 2000.0]
    assert frame["b"].isna().tolist() == [True, False] and frame["b"][1] == 5
    assert frame["c"].isna().tolist() == [False, True]


def test_a_file_without_names(tmp_path):
    path = written(tmp_path / "t.csv", "5.1,3.5\n4.9,3.0\n")
    with pytest.warns(UserWarning, match="first line looks like data"):
        TableFile(path)
    file = TableFile(path, header=None)
    assert file.names == ["x0", "x1"] and file.count() == 2


def test_another_encoding_is_said(tmp_path):
    path = written(tmp_path / "t.csv", "k,x\ncafé,1\n€,2\n", "cp1252")
    with pytest.warns(UserWarning, match="read as Windows-1252"):
        file = TableFile(path)
    assert file.read()["k"].tolist() == ["café", "€"]
    with pytest.raises(ValueError, match="not utf-8"):
        TableFile(path, encoding="utf-8")
    late = written(tmp_path / "late.csv", "k,x\n" + "a,1\n" * 20_000 + "é,2\n", "latin-1")
    with pytest.warns(UserWarning, match="Windows-1252"):
        assert TableFile(late).read()["k"].iloc[-1] == "é"


def test_codes_with_zeros_stay_text(tmp_path):
    path = written(tmp_path / "t.csv", "zip,x\n00501,0.5\n10001,0\n")
    with pytest.warns(UserWarning, match=r"\['zip'\] are read as text"):
        file = TableFile(path)
    assert file.read()["zip"].tolist() == ["00501", "10001"]
    assert TableFile(path, dtype={"zip": int}).read()["zip"].tolist() == [501, 10001]


def test_a_column_has_one_kind_in_all_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("pyroflows.density.streaming.CHUNK", 10)
    frame = pd.DataFrame(
        {
            "late": ["1"] * 25 + ["A7"] * 5,
            "gappy": [1.0] * 15 + [np.nan] * 15,
            "empty_first": [None] * 12 + ["z"] * 18,
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    file = TableFile(tmp_path / "t.csv")
    parts = list(file.batches())
    assert [len(p) for p in parts] == [10, 10, 10]
    assert all(isinstance(v, str) for p in parts for v in p["late"])
    pd.testing.assert_frame_equal(file.read(), pd.read_csv(tmp_path / "t.csv"), check_dtype=False)
    rows = np.sort(pd.concat(file.shuffled(20, np.random.default_rng(0))).index)
    assert len(rows) == 30


def test_bad_rows_are_errors(tmp_path):
    path = written(tmp_path / "t.csv", "a,b\n1,2\n3,4,5,6\n")
    with pytest.raises(ValueError, match="Expected 2 fields"):
        TableFile(path).read()
    with pytest.raises(ValueError, match="more fields than the 2 names"):
        TableFile(written(tmp_path / "v.csv", "a,b\n1,2,3\n3,4,5\n"))
    with pytest.raises(ValueError, match=r"no columns \['z'\]"):
        TableFile(written(tmp_path / "u.csv", "a,b\n1,2\n"), ["z"])
    with pytest.raises(ValueError, match="expected a file or folder of one kind"):
        TableFile(written(tmp_path / "t.xlsx", "?"))
    with pytest.raises(OSError, match="nowhere"):
        TableFile(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_spark_and_hive_folders(tmp_path, ending):
    folder = tmp_path / "table"
    for year in (2023, 2024):
        part = folder / f"year={year}" / f"part-00000.{ending}"
        part.parent.mkdir(parents=True)
        if ending == "parquet":
            pytest.importorskip("pyarrow")
            TABLE.to_parquet(part)
        else:
            TABLE.to_csv(part, index=False)
    (folder / "_SUCCESS").touch()
    (folder / "year=2023" / ".part-00000.crc").touch()
    file = TableFile(folder)
    assert file.names == [*TABLE, "year"] and file.count() == 8
    frame = file.read()
    assert frame["year"].tolist() == [2023] * 4 + [2024] * 4
    pd.testing.assert_frame_equal(frame.drop(columns="year")[:4], TABLE)
    assert TableFile(folder, ["year", "count"]).read().shape == (8, 2)


def test_files_of_a_folder_agree(tmp_path):
    written(tmp_path / "a.csv", "x,y\n1,2\n")
    written(tmp_path / "b.csv", "x,z\n1,2\n")
    with pytest.raises(ValueError, match=r"a.csv has \['x', 'y'\], b.csv has \['x', 'z'\]"):
        TableFile(tmp_path)


def test_parquet_in_row_groups(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"x": np.arange(100.0), "k": list("ab") * 50}, index=np.arange(100) * 7)
    frame.to_parquet(tmp_path / "t.parquet", row_group_size=30)
    file = TableFile(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(file.read(), frame.reset_index(drop=True))
    shares = [
        pd.concat(file.shuffled(25, np.random.default_rng(0), rank=r, world=2)) for r in (0, 1)
    ]
    assert sorted(pd.concat(shares)["x"]) == frame["x"].tolist()
    assert 20 <= len(file.sample(24, np.random.default_rng(0))) <= 32
    with pytest.raises(ValueError, match="'sep'.*are for text"):
        TableFile(tmp_path / "t.parquet", sep=";")


def test_gzip_is_read_by_its_name(tmp_path):
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write("a,b\n1,2\n")
    assert TableFile(tmp_path / "t.csv.gz").read().to_dict("list") == {"a": [1], "b": [2]}


@pytest.mark.parametrize(
    ("cell", "last", "said"),
    [
        ("${:,.2f}", "$1.00", r"numbers written with \$ ,?.*convert them"),
        ("{}%", "4%", "numbers written with %.*convert them"),
        ("{},5", "1,5", "numbers written with ,.*decimal="),
        ("{}", "?", r"numbers, but for 1, e.g. '\?'; .*na_values=\['\?'\]"),
        ("{}", "n.k.", r"numbers.*na_values=\['n.k.'\]"),
    ],
)
def test_text_that_writes_numbers_is_said(tmp_path, cell, last, said):
    rows = [cell.format(1000 * i) for i in range(60)] + [last]
    pd.DataFrame({"v": rows}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.warns(UserWarning, match="column 'v' has 61 labels that are " + said):
        Schema.from_frame(TableFile(tmp_path / "t.csv").read())


def test_labels_that_are_no_numbers_pass_in_silence(tmp_path):
    codes = [f"0{i:04d}" for i in range(30)] * 3
    Schema.from_frame(pd.DataFrame({"zip": codes, "kind": [f"type {i % 30}" for i in range(90)]}))


@pytest.mark.parametrize("form", ["%m/%d/%Y", "%d.%m.%Y", "%d %b %Y", "%b %d, %Y"])
def test_times_in_text_are_said(form):
    days = pd.Series(pd.date_range("2024-01-01", periods=100).strftime(form).to_numpy())
    table = pd.DataFrame(
        {"day": days.sample(500, replace=True, random_state=0, ignore_index=True)}
    )
    with pytest.warns(UserWarning, match="column 'day' has .* labels that are times in text"):
        Schema.from_frame(table)
