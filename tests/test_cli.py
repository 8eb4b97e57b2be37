"""The command line: verbs, exit statuses, one line for what is wrong."""

import sys
import types

import pytest

import slos_serve
from slos_serve import cli
from slos_serve.errors import ConfigError, MissingExtraError, SlosServeError


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `slos-serve` with one extra verb, `try`, whose body the test gives."""

    def call(*arguments, body=lambda args: 0, **attributes):
        module = types.ModuleType("a_verb")
        module.HELP = "Try things."
        module.configure = lambda parser: parser.add_argument("--count", type=int, default=0)
        module.run = body
        for name, value in attributes.items():
            setattr(module, name, value)
        monkeypatch.setattr(cli, "find_verbs", lambda: {"try": "a_verb"})
        monkeypatch.setitem(sys.modules, "a_verb", module)
        status = cli.main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def raising(error):
    def body(args):
        raise error

    return body


def test_version_is_printed_alone(run):
    assert run("--version") == (0, f"slos-serve {slos_serve.__version__}\n", "")


def test_no_verb_shows_the_overview_and_fails(run):
    status, out, _ = run()
    assert status == 2
    assert "try        Try things." in out


def test_help_shows_the_overview(run):
    assert run("--help")[0] == 0
    assert run("help")[0] == 0


def test_an_unknown_verb_is_told_in_one_line_that_names_the_known(run):
    status, out, err = run("sevre")
    assert (status, out) == (2, "")
    assert err == "slos-serve: 'sevre': expected one of try\n"


def test_a_verb_s_status_is_the_exit_status(run):
    assert run("try", body=lambda args: 1)[0] == 1
    assert run("try", "--count", "3", body=lambda args: args.count - 3)[0] == 0


def test_a_bad_argument_is_one_line_and_status_2(run):
    status, out, err = run("try", "--count", "many")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "--count" in err
    assert "'many'" in err


def test_arguments_are_never_guessed_from_abbreviations(run):
    assert run("try", "--cou", "3")[0] == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError(where="slo.yaml", key="classes.chat.tpot_ms", value=-1, expected="a positive number"), 2),
        (ValueError("trace.csv: line 3: tokens = 'x': expected a whole number"), 2),
        (FileNotFoundError(2, "No such file or directory", "profile.json"), 2),
        (SlosServeError("the server went away"), 1),
        (ConnectionRefusedError(111, "Connection refused"), 1),
        (MissingExtraError(module="matplotlib", extra="bench"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_statuses_and_at_most_one_line(run, error, status):
    code, out, err = run("try", body=raising(error))
    assert (code, out) == (status, "")
    assert err.count("\n") <= 1
    assert str(error) in err


@pytest.mark.parametrize("stage", ["load", "run"])
def test_an_interrupt_is_told_in_one_word_at_start_up_too(run, monkeypatch, stage):
    if stage == "load":
        monkeypatch.setattr(cli, "load", raising(KeyboardInterrupt()))
    assert run("try", body=raising(KeyboardInterrupt())) == (130, "", "interrupted\n")


def test_a_verb_that_has_told_of_its_interrupt_is_not_repeated(run):
    assert run("try", body=lambda args: 130) == (130, "", "")


def test_a_bug_is_not_hidden(run):
    with pytest.raises(ZeroDivisionError):
        run("try", body=lambda args: 1 / 0)


def test_a_verb_may_pass_on_what_it_does_not_know(run):
    seen = []
    body = lambda args: seen.extend(args.extra) or 0  # noqa: E731
    assert run("try", "--dtype", "float32", "--count", "1", body=body, TAKES_UNKNOWN=True)[0] == 0
    assert seen == ["--dtype", "float32"]


def test_verbs_without_a_module_do_not_appear(monkeypatch):
    monkeypatch.setattr(
        cli, "VERBS", {"gone": "slos_serve.no_such_module", "lost": "slos_serve.no.such", "doctor": "json"}
    )
    assert cli.find_verbs() == {"doctor": "json"}


@pytest.mark.parametrize("verb", cli.find_verbs())
def test_every_verb_s_help_has_an_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert f"slos-serve {verb}" in capsys.readouterr().out.partition("xample")[2]
