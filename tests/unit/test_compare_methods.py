"""`benchmarks/compare_methods.py` as a command, with runs that nobody trained."""

import json

import pytest

from benchmarks.compare_methods import main
from tests.support.study_runs import STUDY, fake_run


def by_rate(config):
    """The best learning rate is 0.002."""
    return {0.001: 60, 0.002: 80, 0.004: 70}.get(config.train.learning_rate, 50)


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_the_whole_command_tunes_runs_and_writes(study_file, tmp_path, capsys):
    out, seen = tmp_path / "out", []
    assert main([str(study_file), "--out", str(out)], fake_run(by_rate, seen)) == 0
    # tune: 6 + 6... treelora 6, routed 3, sequential 3, joint 3; run: 3 x 4 + 2 x 2; quality: 2 x 4
    assert len(seen) == len(set(seen)) == 15 + 16 + 8
    text = capsys.readouterr().out
    assert "small: all variants at equal steps" in text
    assert json.loads((out / "tuned.json").read_text())["sequential"]["setting"] == {"train.learning_rate": 0.002}
    names = {"rows", "standings", "differences", "ablation", "quality", "tuning"}
    assert {path.stem for path in out.glob("*.parquet")} == {path.stem for path in out.glob("*.csv")} == names
    assert "## small: cost at equal quality" in (out / "comparison.md").read_text()
    assert (out / "figures" / "cost-last.png").read_bytes().startswith(b"\x89PNG")
    before = len(seen)
    assert main([str(study_file), "--out", str(out)], fake_run(by_rate, seen)) == 0
    assert len(seen) == before


def test_single_phases_and_variants(study_file, tmp_path, capsys):
    out, seen = tmp_path / "out", []
    arguments = [str(study_file), "--out", str(out), "--only", "sequential"]
    run = fake_run(by_rate, seen)
    # not tuned yet: nothing is run, and that is no success
    assert main([*arguments, "--phase", "run"], run) == 1
    assert "sequential is left out: sequential is not tuned yet" in capsys.readouterr().out
    assert seen == []
    assert main([*arguments, "--phase", "tune"], run) == 0
    assert len(seen) == 3
    assert main([*arguments, "--phase", "run", "table"], run) == 0
    assert len(seen) == 7
    assert "treelora has no runs: treelora is not tuned yet" in capsys.readouterr().out


def test_a_dry_run_starts_nothing(study_file, tmp_path, capsys):
    out, seen = tmp_path / "out", []
    run = fake_run(by_rate, seen)
    assert main([str(study_file), "--out", str(out), "--dry-run"], run) == 0
    text = capsys.readouterr().out
    assert seen == []
    assert "tune: 15 of 15 runs left" in text
    assert "run: 16 of 16 runs left, 4 variants to be tuned first, time unknown" in text
    main([str(study_file), "--out", str(out), "--phase", "tune"], run)
    capsys.readouterr()
    main([str(study_file), "--out", str(out), "--dry-run"], run)
    text = capsys.readouterr().out
    assert "tune: 0 of 15 runs left" in text
    assert "in all: 24 runs left, about" in text


def test_exit_codes_of_failures_refusals_and_interruptions(study_file, tmp_path, capsys):
    arguments = [str(study_file), "--out", str(tmp_path / "out")]
    good = fake_run(by_rate)

    def breaks(config, console):
        if config.method == "joint":
            raise RuntimeError("no memory")
        good(config, console)

    def interrupted(config, console):
        raise KeyboardInterrupt

    assert main(arguments, interrupted) == 130
    assert main(arguments, breaks) == 1
    assert "no memory" in capsys.readouterr().out
    assert "Failed: joint, order 1, seed 7" in (tmp_path / "out" / "comparison.md").read_text()
    assert main([*arguments, "--only", "ewc"], good) == 2
    assert "--only: no variant 'ewc'" in capsys.readouterr().out


def test_the_reduced_study_keeps_its_tables_apart(study_file, tmp_path):
    out, seen = tmp_path / "out", []
    assert main([str(study_file), "--out", str(out), "--reduced"], fake_run(by_rate, seen)) == 0
    assert len(seen) == 5 + 2  # five variants; treelora and sequential with fewer steps too
    assert (out / "reduced" / "comparison.md").exists()
    assert not (out / "comparison.md").exists()
