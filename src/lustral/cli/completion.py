"""``lustral completion SHELL``: a script that completes commands, flags, and names of methods, made from the flags' dataclasses.

The script asks ``lustral`` nothing while somebody types, which would take seconds; it is written again after an update.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from lustral.cli.overview import VERBS
from lustral.cli.parsing import FLAT, UsageError

COMPLETION = "completion"
POSITIONAL = "Positional"  # how the marker of ``tyro`` prints
MOLECULES = (
    "implant",
    "generate",
    "sift",
    "scan",
    "erase",
    "evaluate",
    "demo",
)  # a test compares them with the parser's


@dataclass(frozen=True, kw_only=True)
class Words:
    """What may follow a command.

    Attributes:
        commands: names of further commands, or of what is positional.
        flags: flags, with their dashes.
        values: values of a flag that takes one of a few.
    """

    commands: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def flags_of(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the flags that ``tyro`` gives the fields of a dataclass; positional ones and type variables have none.

    >>> from lustral.cli.parsing import Common
    >>> list(flags_of(Common))
    ['--seed', '--device', '--json', '--quiet', '--debug']
    """
    hints = get_type_hints(kind, include_extras=True)
    for part in fields(cast(Any, kind)):
        hint, name = hints[part.name], part.name.replace("_", "-")
        extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        base = get_args(hint)[0] if extras else hint
        inner = next((one for one in (base, *get_args(base)) if is_dataclass(one)), None)
        if isinstance(base, TypeVar) or POSITIONAL in map(str, extras):
            continue
        if inner is not None:
            yield from flags_of(cast(type, inner), prefix if FLAT in extras else f"{prefix}{name}.")
            continue
        yield f"--{prefix}{name}"
        if base is bool and not extras:
            yield f"--{prefix}no-{name}"


def words() -> dict[tuple[str, ...], Words]:
    """Return what may follow each command, by its path: () for ``lustral``, ("bench", "run") for that."""
    from lustral.api.methods import DEFAULT_DETECTOR, DEFAULT_PURIFIER
    from lustral.catalog import ATTACKS, DETECTORS, PURIFIERS, SAFE_TRAINERS, SIFTERS
    from lustral.cli import arguments
    from lustral.cli.bench_arguments import Action
    from lustral.cli.saved.arguments import Report
    from lustral.cli.untrusted.arguments import Sift, Train
    from lustral.vision.erasing import scan_method
    from lustral.vision.sources import source_names
    from lustral.vision.victims import NO_ATTACK

    data = {"--data": source_names()}
    methods: dict[str, Mapping[str, type]]
    methods = {"scan": DETECTORS, "erase": PURIFIERS, "sift": SIFTERS, "train": SAFE_TRAINERS}
    shapes: dict[str, tuple[type, ...]] = {
        "demo": (arguments.Demo,),
        "scan": (arguments.Scan, DETECTORS[DEFAULT_DETECTOR]),
        "erase": (arguments.Erase, arguments.SCANNING[scan_method(PURIFIERS[DEFAULT_PURIFIER])]),
        "sift": (Sift,),
        "train": (Train,),
        "evaluate": (arguments.Evaluate,),
        "report": (Report,),
        "implant": (arguments.Implant,),
    }
    found: dict[tuple[str, ...], Words] = {(): Words(commands=(*VERBS, COMPLETION), flags=("--help",))}
    for verb, kinds in shapes.items():
        flags = dict.fromkeys(flag for kind in kinds for flag in flags_of(kind))
        named: dict[str, tuple[str, ...]] = {"--method": tuple(methods[verb])} if verb in methods else {}
        attacks = (*ATTACKS, NO_ATTACK) if verb == "implant" else ()
        found[verb,] = Words(commands=attacks, flags=("--help", *flags), values={**data, **named})
    found["bench",] = Words(commands=tuple(named_kinds(Action)))
    for name, kind in named_kinds(Action).items():
        found["bench", name] = Words(flags=("--help", *flags_of(kind)))
    found["molecules",] = Words(commands=MOLECULES)
    found[COMPLETION,] = Words(commands=tuple(SHELLS))
    return found


def named_kinds(union: Any) -> dict[str, type]:
    """Return the dataclasses of a union of subcommands by their names."""
    return {get_args(part)[1].name: get_args(part)[0] for part in get_args(union)}


def bash(found: Mapping[tuple[str, ...], Words]) -> str:
    """Return the script for bash."""
    cases, values = [], []
    for path, one in found.items():
        cases.append(f'    "{" ".join(path)}") commands="{" ".join(one.commands)}"; flags="{" ".join(one.flags)}" ;;')
        for flag, choices in one.values.items():
            values.append(
                f'    "{" ".join(path)} {flag}") COMPREPLY=($(compgen -W "{" ".join(choices)}" -- "$word")) ;;'
            )
    paths = " ".join(shlex.quote(" ".join(path)) for path in found if path)
    return f"""# bash completion of lustral; written by: lustral completion bash
_lustral() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" last="${{COMP_WORDS[COMP_CWORD-1]}}" path="" commands="" flags="" longer known
  for longer in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    for known in {paths}; do
      [[ "$known" == "${{path:+$path }}$longer" ]] && {{ path="$known"; break; }}
    done
  done
  COMPREPLY=()
  case "$path $last" in
{chr(10).join(values)}
  esac
  [[ ${{#COMPREPLY[@]}} -gt 0 ]] && return
  case "$path" in
{chr(10).join(cases)}
  esac
  if [[ "$word" == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$word"))
  elif [[ "$last" != -* ]]; then
    COMPREPLY=($(compgen -W "$commands" -- "$word"))
  fi
}}
complete -o default -F _lustral lustral
"""


def zsh(found: Mapping[tuple[str, ...], Words]) -> str:
    """Return the script for zsh, which runs that for bash."""
    return f"#compdef lustral\nautoload -U +X bashcompinit && bashcompinit\n{bash(found)}"


def fish(found: Mapping[tuple[str, ...], Words]) -> str:
    """Return the script for fish."""
    lines = ["# fish completion of lustral; written by: lustral completion fish"]
    for path, one in found.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in path) or "__fish_use_subcommand"
        missing = f"; and not __fish_seen_subcommand_from {' '.join(one.commands)}" if path and one.commands else ""
        if one.commands:
            lines.append(
                f"complete -c lustral -f -n {shlex.quote(seen + missing)} -a {shlex.quote(' '.join(one.commands))}"
            )
        for flag in one.flags:
            choices = f" -x -a {shlex.quote(' '.join(one.values[flag]))}" if flag in one.values else ""
            lines.append(f"complete -c lustral -n {shlex.quote(seen)} -l {flag[2:]}{choices}")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[Mapping[tuple[str, ...], Words]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def show_script(argv: Sequence[str]) -> int:
    """Print the script for the shell that is named.

    Raises:
        UsageError: there is none for it.
    """
    shell = " ".join(argv)
    if shell not in SHELLS and shell not in ("--help", "-h"):
        raise UsageError(f"expected the name of a shell: lustral completion {{{','.join(SHELLS)}}}; got {shell!r}")
    lines = "usage: lustral completion {bash,zsh,fish}\n\nPrint a script that completes commands, flags and methods.\n"
    sys.stdout.write(SHELLS[shell](words()) if shell in SHELLS else lines)
    return 0
