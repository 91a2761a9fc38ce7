"""The command line, streaming, and fits shared by two processes."""

import io
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from pyroflows.cli import main
from pyroflows.density import DensityEstimator

pytest.importorskip("pyarrow")
pytest.importorskip("safetensors")


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    x = rng.normal(size=4000)
    return pd.DataFrame(
        {"x": x, "y": x + 0.3 * rng.normal(size=4000), "k": np.where(x > 0, "up", "down")}
    )


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_fit_score_sample_inspect(tmp_path, table, ending, capsys):
    path, model = tmp_path / f"t.{ending}", tmp_path / "m.safetensors"
    table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
    fit = ["fit", str(path), "-o", str(model), "--max-steps", "40", "--seed", "0", "--quiet"]
    assert main(fit) == 0
    assert "held-out" in capsys.readouterr().out
    scored = tmp_path / f"s.{ending}"
    assert main(["score", str(model), str(path), "-o", str(scored)]) == 0
    nats = (pd.read_csv if ending == "csv" else pd.read_parquet)(scored)["log_density"]
    np.testing.assert_allclose(nats, DensityEstimator.load(model).score_samples(table), atol=1e-4)
    drawn = tmp_path / f"d.{ending}"
    assert (
        main(
            ["sample", str(model), "-n", "50", "--seed", "1", "--given", "k=up", "-o", str(drawn)]
        )
        == 0
    )
    frame = (pd.read_csv if ending == "csv" else pd.read_parquet)(drawn)
    assert len(frame) == 50 and (frame["k"] == "up").all()
    capsys.readouterr()
    assert main(["sample", str(model), "-n", "3", "--seed", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["inspect", str(model)]) == 0
    assert main(["inspect", str(path)]) == 0
    assert "2 labels" in capsys.readouterr().out
    assert main(["report", str(model), str(path), "--train", str(path), "--seed", "0"]) == 0
    assert "Synthetic rows" in (said := capsys.readouterr().out) and "two-sample AUC" in said


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A table with missing labels, codes and a column that no model needs; its model; a folder."""
    folder = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(1)
    n = 600
    frame = pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(n)],
            "age": rng.integers(20, 60, n),
            "segment": np.where(rng.random(n) < 0.5, "corp", "retail"),
            "code": np.where(rng.random(n) < 0.5, "1", "2"),
        }
    )
    frame.loc[rng.random(n) < 0.2, "segment"] = None
    frame.to_csv(folder / "t.csv.gz", index=False)
    frame.to_parquet(folder / "t.parquet")
    model = DensityEstimator(
        target=["age", "segment", "code"], given=[], max_steps=20, random_state=0, members=1
    )
    model.fit(frame).save(folder / "m.safetensors")
    return frame, folder


def test_scores_are_those_of_python_and_keep_all_columns(people, capsys):
    frame, folder = people
    model = DensityEstimator.load(folder / "m.safetensors")
    expected = model.score_samples(frame[["age", "segment", "code"]])
    for ending in ("csv", "parquet"):
        part = folder / f"spark_{ending}" / f"part-00000.{ending}"
        part.parent.mkdir()
        frame.to_csv(part, index=False) if ending == "csv" else frame.to_parquet(part)
    for table in ("t.csv.gz", "t.parquet", "spark_csv", "spark_parquet"):
        out = folder / "scored.csv.gz"
        assert (
            main(["score", *map(str, (folder / "m.safetensors", folder / table)), "-o", str(out)])
            == 0
        )
        scored = pd.read_csv(out)
        assert list(scored) == [*frame, "log_density"]
        np.testing.assert_allclose(scored["log_density"], expected, rtol=1e-9)
        assert scored["id"].tolist() == frame["id"].tolist()
    assert (
        main(["score", str(folder / "m.safetensors"), str(out), "-o", str(folder / "b.csv")]) == 1
    )
    assert "has a column log_density already" in capsys.readouterr().err


def test_samples_come_in_one_stream(people, monkeypatch, capsys):
    folder = people[1]
    monkeypatch.setattr("pyroflows.cli.CHUNK", 40)
    sample = ["sample", str(folder / "m.safetensors"), "-n", "100"]
    assert main(sample) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 101 and lines.count(lines[0]) == 1  # one header
    assert lines[1:41] != lines[41:81]
    assert main([*sample, "--seed", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == lines  # the fit's seed was 0
    assert main([*sample, "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines() != lines


def test_given_values_add_up(people, capsys):
    folder = people[1]
    sample = ["sample", str(folder / "m.safetensors"), "-n", "30"]
    assert main([*sample, "--given", "segment=corp", "--given", "age=30", "code=1"]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert set(frame["segment"]) == {"corp"} and set(frame["age"]) == {30}
    assert main([*sample, "--given", "segment=corp", "--given", "segment=retail"]) == 1
    assert "'segment' is given twice, 'corp' and 'retail'" in capsys.readouterr().err
    assert main([*sample, "--given", "height=3"]) == 1
    assert "no column 'height'" in capsys.readouterr().err


def test_nothing_is_overwritten_and_nothing_is_too_late(people, capsys):
    folder = people[1]
    table, model = str(folder / "t.csv.gz"), str(folder / "m.safetensors")
    before = (folder / "t.csv.gz").read_bytes()
    refused = {
        ("fit", table, "-o", table): "cannot be the output as well",
        ("fit", table, "-o", str(folder / "t.parquet")): "is no model file",
        ("fit", table, "-o", str(folder / "none" / "m.safetensors")): "does not exist",
        ("fit", table, "-o", str(folder)): "is a folder",
        ("score", model, table, "-o", model): "cannot be the output as well",
        ("score", model, table, "-o", str(folder / "s.xlsx")): "expected a name ending in",
        ("sample", model, "-o", str(folder / "none" / "s.csv")): "does not exist",
    }
    for command, words in refused.items():
        assert main(list(command)) == 1, command
        assert words in capsys.readouterr().err
    assert (folder / "t.csv.gz").read_bytes() == before


def test_formats_and_schema(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("a;b;zip\n" + "1,5;?;101\n2,5;3;102\n3,5;4;103\n" * 3)
    shown = ["inspect", str(path), "--decimal", ",", "--na", "?"]
    assert main([*shown, "--schema", '{"a": {"step": null}}']) == 0
    out = capsys.readouterr().out
    assert "continuous" in out and "0.333" in out
    with pytest.raises(SystemExit):
        main([*shown, "--schema", "{"])
    assert "is no JSON" in capsys.readouterr().err
    assert main(["inspect", str(path), "--encoding", "ascii-8"]) == 1
    assert "unknown encoding" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("pyroflows 0.")


def test_errors_go_to_stderr(tmp_path, table, capsys):
    path = tmp_path / "t.csv"
    table.to_csv(path, index=False)
    assert main(["fit", str(path), "-o", str(tmp_path / "m"), "--target", "z", "--quiet"]) == 1
    assert "unknown: ['z']" in capsys.readouterr().err
    assert main(["score", str(path), str(path)]) == 1
    assert "not a safetensors file" in capsys.readouterr().err
    assert main(["inspect", "nowhere.csv"]) == 1


def test_streamed_fit_is_as_good(tmp_path, table):
    path = tmp_path / "t.parquet"
    table.to_parquet(path, row_group_size=500)
    options = dict(max_steps=150, random_state=0, members=1, hidden_dim=32, batch_size=256)
    whole = DensityEstimator(**options).fit_file(path)
    streamed = DensityEstimator(**options).fit_file(path, in_memory=1000, sample_rows=1500)
    assert streamed.score(table) > whole.score(table) - 0.15
    assert list(streamed.feature_names_in_) == ["x", "y", "k"]


def test_two_processes_fit_one_model(tmp_path, table):
    path = tmp_path / "t.parquet"
    table.to_parquet(path, row_group_size=500)
    code = (
        "import sys, torch, torch.distributed as d; torch.set_num_threads(1)\n"
        "from pyroflows.density import DensityEstimator\n"
        "d.init_process_group('gloo')\n"
        "for k, memory in enumerate((10**6, 1000)):\n"
        "    m = DensityEstimator(max_steps=40, random_state=0, hidden_dim=16, members=1,\n"
        "        batch_size=256)\n"
        "    m.fit_file(sys.argv[1], in_memory=memory)\n"
        "    p = torch.cat([q.detach().flatten() for q in m.model_.parameters()])\n"
        "    both = [torch.empty_like(p) for _ in range(2)]; d.all_gather(both, p)\n"
        "    assert torch.equal(*both), (both[0] - both[1]).abs().max()\n"
        "    m.save(sys.argv[2] + str(k))\n"
        "d.destroy_process_group()\n"
    )
    script = tmp_path / "fit.py"
    script.write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29517",
    ]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(path), str(tmp_path / "m")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = DensityEstimator(
        max_steps=40, random_state=0, hidden_dim=16, members=1, batch_size=256
    ).fit(table)
    for k in (0, 1):
        shared = DensityEstimator.load(str(tmp_path / "m") + str(k))
        assert shared.score(table) == pytest.approx(one.score(table), abs=0.2)
