"""The command line's frame: start-up budgets, help without imports, exit codes, `env`."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commissure import cli
from commissure.core.errors import CommissureError, InputError


def cpu_seconds(*arguments: str) -> float:
    """Least CPU time of five runs of a fresh interpreter."""
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


def test_import_takes_at_most_50_ms() -> None:
    assert cpu_seconds("-c", "import commissure") - cpu_seconds("-c", "pass") <= 0.050


def test_help_takes_at_most_400_ms() -> None:
    assert cpu_seconds("-m", "commissure.cli", "--help") <= 0.4


@pytest.mark.parametrize(
    "code",
    [
        "import commissure",
        "from commissure.cli import main; main(['--help'])",
        "from commissure.cli import main; main(['reproduce', '--help'])",
        "from commissure.cli import main; main(['env', '--help'])",
        "from commissure.cli import main; main(['mesa', '--help'])",
        "from commissure.cli import main; main(['mesa', 'fit', '--help'])",
        "from commissure.cli import main; main(['metahmm', '--help'])",
        "from commissure.cli import main; main(['metahmm', 'fit', '--help'])",
        "from commissure.cli import main; main(['reservoirs', '--help'])",
        "from commissure.cli import main; main(['geometry', '--help'])",
        "from commissure.cli import main; main(['geometry', 'trace', '--help'])",
        "from commissure.cli import main; main(['reservoirs', 'eval', '--help'])",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    check = "import sys; assert not {'torch', 'scipy', 'matplotlib', 'pandas'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", f"{code}\n{check}"], check=True, stdout=subprocess.DEVNULL)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    assert list(cli.COMMANDS) == sorted(cli.COMMANDS)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("x", 1, "2"), 2, "x = 1: expected 2"),
        (CommissureError("broken"), 3, "CommissureError: broken"),
        (ZeroDivisionError("oops"), 3, "Traceback"),
        (KeyboardInterrupt(), 130, "kept"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    assert cli.main([]) == code
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""


def test_unknown_command_and_option_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["levitate"]) == 2
    assert cli.main(["env", "--nonsense"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [["levitate"], ["env", "--nonsense"]])
def test_another_process_of_torchrun_waits_for_the_first(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: heard.append(capsys.readouterr().err))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(arguments) == 2
    assert heard == [], "the variable alone is not torchrun"
    capsys.readouterr()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cli.main(arguments) == 2
    assert heard == [""], "silent, until the first must be through"
    assert arguments[-1] in capsys.readouterr().err, "an error of its own is not lost"
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert capsys.readouterr().err == "", "ended by torchrun, after the first had spoken"
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    assert cli.main(arguments) == 130


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import commissure

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == commissure.__version__


def test_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COMMISSURE_HOME", str(tmp_path))
    monkeypatch.setenv("COMMISSURE_DATA", "some-folder")
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["versions", "commit", "machine", "backend", "device", "threads", "data", "run store"]
    assert facts["backend"] in ("c++", "python")
    assert facts["run store"] == str(tmp_path / "runs.sqlite")
    assert facts["data"].startswith("some-folder")
    assert cli.main(["env"]) == 0
    assert "backend" in capsys.readouterr().out
    assert not (tmp_path / "runs.sqlite").exists(), "looking changes nothing"
