"""`slos-serve completion`: what makes a shell complete verbs, flags, the values that are known, and files."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence

from slos_serve import cli

HELP = "Print what makes bash, zsh or fish complete this command."
WHERE = {
    "bash": "slos-serve completion bash > ~/.local/share/bash-completion/completions/slos-serve",
    "zsh": "slos-serve completion zsh > ~/.slos-serve.zsh   # and in ~/.zshrc: source ~/.slos-serve.zsh",
    "fish": "slos-serve completion fish > ~/.config/fish/completions/slos-serve.fish",
}
BASH = """# completion of slos-serve
_slos_serve() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" verb="${COMP_WORDS[1]}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="@VERBS@"
    else
        case "$verb" in
@FLAGS@
        esac
        case "$verb $before" in
@VALUES@
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [ ${#COMPREPLY[@]} -gt 0 ] || COMPREPLY=($(compgen -f -- "$word"))
}
complete -o filenames -F _slos_serve slos-serve
"""
ZSH = "autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `completion`."""
    parser.epilog = "\n".join(
        ["examples, putting it where the shell looks:", *(f"  {line}" for line in WHERE.values())]
    )
    parser.add_argument("shell", choices=sorted(WHERE), help="the shell that is to complete")


def run(args: argparse.Namespace) -> int:
    """Print the shell's script."""
    parsers = {verb: cli.parser_of(verb, cli.load(module)) for verb, module in cli.find_verbs().items()}
    print(fish(parsers) if args.shell == "fish" else (ZSH if args.shell == "zsh" else "") + bash(parsers), end="")
    return 0


def bash(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the script for bash, which zsh can run too."""
    flags, values = [], []
    for verb, parser in parsers.items():
        known = list(_flags(parser))
        words = " ".join(option for options, _ in known for option in options)
        flags.append(f"        {verb}) words={shlex.quote(words)} ;;")
        for options, action in known:
            if action.choices:
                pattern = "|".join(f'"{verb} {option}"' for option in options)
                values.append(f"        {pattern}) words={shlex.quote(' '.join(map(str, action.choices)))} ;;")
            elif action.nargs != 0:  # a file or a number: the flags are no answer
                pattern = "|".join(f'"{verb} {option}"' for option in options)
                values.append(f'        {pattern}) words="" ;;')
    script = BASH.replace("@VERBS@", " ".join([*parsers, "--help", "--version"]))
    return script.replace("@FLAGS@", "\n".join(flags)).replace("@VALUES@", "\n".join(values))


def fish(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the script for fish."""
    lines = ["# completion of slos-serve"]
    for verb, parser in parsers.items():
        told = shlex.quote(parser.description or "")
        lines.append(f"complete -c slos-serve -f -n __fish_use_subcommand -a {verb} -d {told}")
        for options, action in _flags(parser):
            names = " ".join(f"-l {one[2:]}" if one.startswith("--") else f"-s {one[1:]}" for one in options)
            choices = f" -x -a {shlex.quote(' '.join(map(str, action.choices)))}" if action.choices else ""
            needs = " -r" if action.nargs != 0 and not choices else ""
            text = shlex.quote((action.help or "").split("(")[0].strip().replace("%%", "%")[:70])
            lines.append(
                f"complete -c slos-serve -n '__fish_seen_subcommand_from {verb}' {names}{choices}{needs} -d {text}"
            )
    return "\n".join(lines) + "\n"


def _flags(parser: argparse.ArgumentParser) -> Iterator[tuple[Sequence[str], argparse.Action]]:
    for action in parser._actions:  # noqa: SLF001 -- argparse does not list them
        if action.option_strings and action.help != argparse.SUPPRESS:
            yield action.option_strings, action
