"""One experiment, one config file; a flag overrides it.

    python dpo.py config/hh.py --beta=0.2 --max_steps=100

A config file is Python: `name = 'hh'` and one dict a stage (`prepare`, `sft`, `dpo`, `sample`). It may also
hold functions, imports, CAPITALS and _private names of its own; any other name in it is a mistake and said so.
Files are read first, in order, then flags, wherever they stand. With neither a file nor `--name`, the embedded
experiment config/reviews.py is meant.

A stage declares its knobs in a dataclass at its top. The annotation is the type, or In[type, 'rule about x'] or
Literal['a', 'b']; the comment beside the knob is what `--help` prints.
"""
import ast
import dataclasses
import difflib
import errno
import inspect
import os
import re
import runpy
import signal
import socket
import sys
import time
import types
import typing
from typing import Annotated as In, Literal

STAGES = ('prepare', 'sft', 'dpo', 'sample')
EMBEDDED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'reviews.py')


class UserError(SystemExit):
    """A user's mistake: one line on stderr and exit status 1, no traceback. Under torchrun it is rank 0's; what another
    rank alone knows it says itself, with its name, if nobody has ended it five seconds later."""
    def __init__(self, message):
        self.message = ' '.join(str(message).split())
        rank, local_rank = os.environ.get('RANK', '0'), os.environ.get('LOCAL_RANK', '0')
        who = '' if rank == '0' else f'rank {rank} on {socket.gethostname()}: '
        if who:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5 if local_rank == '0' else 7)   # torchrun ends all ranks of a machine when one leaves
        super().__init__(f'error: {who}{self.message}')


def _read_file(path, stage):
    """The knobs that config file `path` sets for `stage`, as {key: value}."""
    if not os.path.isfile(path):
        raise UserError(f'config file {path} does not exist (a flag is written --key=value)')
    try:
        found = runpy.run_path(path)
    except Exception as error:
        line = next((f' line {frame.lineno}' for frame in reversed(inspect.getinnerframes(error.__traceback__))
                     if frame.filename == path), '')
        line = f' line {error.lineno}' if isinstance(error, SyntaxError) else line
        raise UserError(f'config file {path}{line}: {type(error).__name__}: {error}') from None
    for key, value in found.items():
        own = key.startswith('_') or key.isupper() or callable(value) or isinstance(value, types.ModuleType)
        if own or key in STAGES + ('name',):
            continue
        raise UserError(f"config file {path}: unknown name '{key}'{_nearest(key, STAGES + ('name',))}")
    knobs = found.get(stage, {})
    if not isinstance(knobs, dict):
        raise UserError(f"config file {path}: '{stage}' must be a dict, not {type(knobs).__name__}")
    return knobs | ({'name': found['name']} if 'name' in found else {})


def _nearest(key, known):
    close = difflib.get_close_matches(key, known, 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def _check(key, value, annotation, where):
    """`value` as the annotated type, or a UserError that names the key and where it came from."""
    rule = None
    if typing.get_origin(annotation) is In:
        annotation, rule = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        if value not in typing.get_args(annotation):
            raise UserError(f"{where}: {key}={value!r} must be one of {', '.join(map(repr, typing.get_args(annotation)))}")
        return value
    if annotation is float and type(value) is int:
        value = float(value)
    if type(value) is not annotation:
        raise UserError(f'{where}: {key}={value!r} must be {annotation.__name__}, not {type(value).__name__}')
    if annotation is float and value - value != 0:
        raise UserError(f'{where}: {key}={value!r} must be a finite number')
    if rule and not eval(rule, {}, {'x': value}):
        raise UserError(f'{where}: {key}={value!r} is out of range: {rule.replace("x", key)}')
    return value


def _from_flag(text, annotation):
    """A flag's text as Python: strings stay as they are written, the rest is a literal."""
    base = typing.get_args(annotation)[0] if typing.get_origin(annotation) is In else annotation
    if base is str or typing.get_origin(base) is Literal and isinstance(typing.get_args(base)[0], str):
        return text
    try:
        return ast.literal_eval({'true': 'True', 'false': 'False'}.get(text, text))
    except (ValueError, SyntaxError):
        return text     # the type check says what is wrong with it


def _excepthook(kind, error, trace):
    """One line where a disk is full or nobody reads stdout, which any print may find; the traceback of anything else."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
        return sys.__excepthook__(kind, error, trace)
    print(f'error: {error.strerror}: {error.filename or "standard output, or a file"}', file=sys.stderr, flush=True)
    os._exit(1)         # python would try to write the rest of stdout, and say so again


def load(Config, stage, argv=None):
    """The config of `stage`: the dataclass's defaults, then files, then flags.

    argv: the command line's arguments (default sys.argv[1:]). `--help` prints the knobs and exits.
    Returns an instance of Config; its attribute `origin` maps each key that was set to where it came from.
    """
    sys.excepthook = _excepthook
    argv = sys.argv[1:] if argv is None else argv
    hints = typing.get_type_hints(Config, include_extras=True)
    files = [a for a in argv if not a.startswith('-')]
    flags = [a for a in argv if a.startswith('-')]
    if '--help' in flags or '-h' in flags:
        print(help_text(Config, stage))
        raise SystemExit(0)
    if not files and not any(a.startswith('--name=') for a in flags):
        files = [EMBEDDED]
    values, origin = {}, {}
    for path in files:
        for key, value in _read_file(path, stage).items():
            if key not in hints:
                raise UserError(f"{path}: unknown key '{key}' for {stage}{_nearest(key, list(hints))}")
            values[key], origin[key] = _check(key, value, hints[key], path), path
    for flag in flags:
        key, equals, text = flag.removeprefix('--').partition('=')
        if not flag.startswith('--') or key not in hints:
            raise UserError(f"flag {flag}: unknown key '{key}' for {stage}{_nearest(key, list(hints))}")
        if not equals and hints[key] is not bool:
            raise UserError(f'flag {flag} needs a value: --{key}=...')
        value = _from_flag(text, hints[key]) if equals else True
        values[key], origin[key] = _check(key, value, hints[key], 'flag'), 'flag'
    config = Config(**values)
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._-]*', config.name):
        raise UserError(f"name={config.name!r} must be letters, digits, '.', '_' or '-': it names data/<name> and out/<name>")
    config.origin = origin
    return config


def show(config):
    """The resolved config, a knob a line, with where each value that is not a default came from."""
    width = max(len(f.name) for f in dataclasses.fields(config))
    lines = []
    for field in dataclasses.fields(config):
        came = config.origin.get(field.name)
        lines.append(f'  {field.name:{width}} = {getattr(config, field.name)!r}' + (f'   ({came})' if came else ''))
    return '\n'.join(lines)


def help_text(Config, stage):
    """What `--help` prints: every knob with its default and the comment that stands beside it."""
    lines = [f'usage: python {os.path.basename(sys.argv[0])} [config/NAME.py] [--key=value ...]', '',
             f'knobs of {stage}, with their defaults:', '']
    for line in inspect.getsource(Config).splitlines():
        knob = re.match(r'    (\w+): .*? = (.*?)(?:\s+# (.*))?$', line)
        more = re.match(r'\s+# (.*)', line)
        if knob:
            lines.append(f'  --{knob[1]}={knob[2]}'.ljust(33) + ' ' + (knob[3] or ''))
        elif more:
            lines.append(' ' * 34 + more[1])
    return '\n'.join(lines)
