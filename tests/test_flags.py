"""The command line: flags, their defaults and help, an earlier run's settings."""

import json
from dataclasses import dataclass
from typing import Literal

import pytest

import flags


@dataclass
class Config:
    base: str = "sd-turbo"  # where from
    learning_rate: float = 1e-4  # how fast
    epochs: int | None = None
    use_ema: bool = False
    kind: Literal["a", "b"] = "a"
    max_train_steps: int = 10
    output_dir: str | None = None
    resume: str | None = None
    dataloader_num_workers: int = 0
    seed: int = 0


TINY = dict(learning_rate=1e-2, seed=7)


def parse(*argv):
    return flags.parse(Config, dict(tiny=TINY), dict(old_name="base"), "doc", list(argv))


def test_flags_fill_the_dataclass_with_its_types():
    cfg = parse("--learning_rate", "0.5", "--epochs", "3", "--use_ema", "--kind", "b", "--old_name", "x/y")
    assert cfg == Config("x/y", 0.5, 3, True, "b")
    assert parse("--use_ema", "off") == Config() and parse("--use_ema", "on") == parse("--use_ema") != Config()


def test_tiny_bases_have_other_defaults_which_flags_override(capsys):
    assert parse("--base", "tiny") == Config("tiny", 1e-2, seed=7)
    assert "--learning_rate 0.01" in capsys.readouterr().err
    assert parse("--base", "tiny-turbo", "--seed", "1").seed == 1


@pytest.mark.parametrize("argv, words", [
    (["--learning_rat", "1"], ["unknown argument --learning_rat", "--learning_rate"]),
    (["--kind", "c"], ["--kind", "'a'", "'b'"]),
    (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
    (["--allow_tf32"], ["--allow_tf32 is not needed"]),
    (["--enable_xformers_memory_efficient_attention"], ["fused"]),
    (["stray"], ["stray"]),
    (["--learning_rate"], ["--learning_rate", "expected one argument"]),
])
def test_wrong_flags_are_one_line_that_helps(argv, words):
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value)


def test_help_shows_the_comment_and_the_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    assert "how fast [0.0001]" in out and "--old_name" in out


def test_resume_keeps_the_settings_and_lets_only_steps_change(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(base="b", learning_rate=0.25, max_train_steps=10)))
    cfg = parse("--resume", str(tmp_path), "--max_train_steps", "20", "--base", "b")
    assert (cfg.base, cfg.learning_rate, cfg.max_train_steps, cfg.output_dir) == ("b", 0.25, 20, str(tmp_path))
    with pytest.raises(ValueError, match="--learning_rate 0.5 differs from the 0.25"):
        parse("--resume", str(tmp_path), "--learning_rate", "0.5")
    assert parse("--resume", str(tmp_path), "--dataloader_num_workers", "3").dataloader_num_workers == 3
    with pytest.raises(ValueError, match="no config.json"):
        parse("--resume", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("text, says", [
    ('{"base": "b"', "Expecting"), ("[1]", "items"), ("[" * 100_000, "recursion"), ('{"seed": "x"}', "--seed"),
    ('{"use_ema": 3}', "--use_ema"), ('{"kind": "c"}', "--kind"), ('{"seed": -1}', "--seed -1"),
])
def test_settings_that_no_flag_would_take_are_refused_on_resuming(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json does not hold the settings of a run") as caught:
        parse("--resume", str(tmp_path))
    assert says in str(caught.value) and "\n" not in str(caught.value)
