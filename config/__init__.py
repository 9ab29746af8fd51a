"""One experiment, one config file; a flag overrides it.

    python dpo.py config/hh.py --beta=0.2 --max_steps=100

A config file is Python: `name = 'hh'` and one dict a stage (`prepare`, `sft`, `dpo`, `sample`). It may also hold
functions, imports, CAPITALS and _private names of its own; any other name is a mistake. Files are read first, in
order, then flags, wherever they stand. Without a file and `--name`, the embedded experiment config/reviews.py is run.

A stage declares its knobs in a dataclass at its top. The annotation is the type, or In[number, 'rule about x'] or
Literal['a', 'b'], of strings; the comment beside the knob is what `--help` prints.
"""
import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import runpy
import signal
import socket
import sys
import time
import traceback
import types
import typing
from typing import Annotated as In, Literal

STAGES = ('prepare', 'sft', 'dpo', 'sample')
EMBEDDED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'reviews.py')


class UserError(SystemExit):
    """A user's mistake. `run` prints it as one line, without a traceback, and the exit status is 1."""
    def __init__(self, message):
        self.message = ' '.join(str(message).split())
        super().__init__(f'error: {self.message}')


def need(condition, message):
    """An assert for what a user can get wrong. `python -O` keeps it."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def one_line(what, path=''):
    """Whatever goes wrong in here becomes one line: what, the error, and the line of the user's file `path`."""
    try:
        yield
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f' ({path} line {lines[-1]})' if lines else ''
        sentence = str(error).split('. ')[0]        # torch's next one tells how to run code from a checkpoint
        raise UserError(f'{what}: {type(error).__name__}: {sentence[:300]}{where}') from None


def run(main):
    """Call main(). End with one line on stderr where the user, a full disk or a closed pipe stopped it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C just ends it, until there is something to save
    try:
        main()
        sys.stdout.flush()                              # now, to see a full disk or a closed pipe
    except UserError as error:
        fail(error.message)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
            raise
        fail(f'{error.strerror}: {error.filename or "standard output, or a file"}')


def fail(message):
    """Print the line and leave with status 1.

    Most errors meet every rank, and torchrun ends all ranks of a machine when one leaves. So the others wait a while:
    rank 0 speaks for all. A rank that is still there then met the error alone, and says which rank it is.
    """
    rank = os.environ.get('RANK', '0')
    if rank != '0':
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5 if os.environ.get('LOCAL_RANK') == '0' else 7)
        message = f'rank {rank} on {socket.gethostname()}: {message}'
    print(f'error: {message}', file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(1)         # python's own exit would wait for gloo's threads, and complain once more of a closed pipe


def nearest(key, known):
    close = difflib.get_close_matches(str(key), known, 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def read_file(path, stage):
    """The knobs that config file `path` sets for `stage`, {key: value}, and its functions, {name: function}."""
    need(os.path.isfile(path), f'config file {path} does not exist (a flag is written --key=value)')
    with one_line(f'config file {path}', path):
        names = runpy.run_path(path)
    functions = {key: value for key, value in names.items() if callable(value)}
    for key, value in names.items():
        free = key.startswith('_') or key.isupper() or key in functions or isinstance(value, types.ModuleType)
        need(free or key in (*STAGES, 'name'),
             f"config file {path}: unknown name '{key}'{nearest(key, [*STAGES, 'name'])}")
    knobs = names.get(stage, {})
    need(isinstance(knobs, dict), f"config file {path}: '{stage}' must be a dict, not {type(knobs).__name__}")
    if 'name' in names:
        knobs = knobs | {'name': names['name']}
    return knobs, functions


def check_value(key, value, annotation, where):
    """`value` as the annotated type, or a UserError that names the key and where it came from."""
    rule = None
    setting = f'{where}: {key}={value!r:.80}'
    if typing.get_origin(annotation) is In:
        annotation, rule = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        need(value in choices, f"{setting} must be one of {', '.join(map(repr, choices))}")
        return value
    if annotation is float and type(value) is int:
        with contextlib.suppress(OverflowError):        # then the next line says no
            value = float(value)
    need(type(value) is annotation, f'{setting} must be {annotation.__name__}, not {type(value).__name__}')
    need(annotation is not float or math.isfinite(value), f'{setting} must be a finite number')
    if rule:
        need(eval(rule, {}, {'x': value}), f'{setting} is out of range: {rule.replace("x", key)}')
    return value


def from_flag(text, annotation):
    """A flag's text as Python: strings stay as they are written, the rest is a literal."""
    if annotation is str or typing.get_origin(annotation) is Literal:
        return text
    try:
        return ast.literal_eval({'true': 'True', 'false': 'False'}.get(text, text))
    except (ValueError, SyntaxError):
        return text     # the type check says what is wrong with it


def load(Config, stage, argv=None):
    """The config of `stage`: the dataclass's defaults, then files, then flags.

    argv: the command line's arguments (default sys.argv[1:]). `--help` prints the knobs and exits.
    Returns an instance of Config. Its `origin` maps each key that was set to where it came from; its `functions` are
    those of the config files, such as row(raw).
    """
    argv = sys.argv[1:] if argv is None else argv
    hints = typing.get_type_hints(Config, include_extras=True)
    files = [a for a in argv if not a.startswith('-')]
    flags = [a for a in argv if a.startswith('-')]
    if '--help' in flags or '-h' in flags:
        print(help_text(Config, stage))
        raise SystemExit(0)
    if not files and not any(a.startswith('--name=') for a in flags):
        files = [EMBEDDED]
    values, origin, functions = {}, {}, {}
    for path in files:
        knobs, own_functions = read_file(path, stage)
        functions |= own_functions
        for key, value in knobs.items():
            need(key in hints, f"{path}: unknown key '{key}' for {stage}{nearest(key, list(hints))}")
            values[key] = check_value(key, value, hints[key], path)
            origin[key] = path
    for flag in flags:
        key, equals, text = flag.removeprefix('--').partition('=')
        need(flag.startswith('--') and key in hints,
             f"flag {flag}: unknown key '{key}' for {stage}{nearest(key, list(hints))}")
        need(equals or hints[key] is bool, f'flag {flag} needs a value: --{key}=...')
        value = from_flag(text, hints[key]) if equals else True
        values[key] = check_value(key, value, hints[key], 'flag')
        origin[key] = 'flag'
    config = Config(**values)
    need(re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._-]*', config.name),
         f"name={config.name!r} must be letters, digits, '.', '_' or '-': it names data/<name> and out/<name>")
    config.origin = origin
    config.functions = functions
    return config


def show(config):
    """The resolved config, a knob a line, with where each value that is not a default came from."""
    knobs = dataclasses.asdict(config)
    width = max(map(len, knobs))
    origins = {key: f'   ({origin})' for key, origin in config.origin.items()}
    return '\n'.join(f'  {key:{width}} = {value!r}{origins.get(key, "")}' for key, value in knobs.items())


def help_text(Config, stage):
    """What `--help` prints: every knob with its default and the comment that stands beside it."""
    lines = [f'usage: python {os.path.basename(sys.argv[0])} [config/NAME.py] [--key=value ...]',
             f'\nknobs of {stage}, with their defaults:\n']
    hints = typing.get_type_hints(Config, include_extras=True)
    for line in inspect.getsource(Config).splitlines():
        knob = re.match(r'    (\w+): .*? = (.*?)(?:\s+# (.*))?$', line)
        more = re.match(r'\s+# (.*)', line)
        if knob:
            lines.append(f'  --{knob[1]}={knob[2]}'.ljust(33) + ' ' + (knob[3] or ''))
            if typing.get_origin(hints[knob[1]]) is Literal:
                lines.append(' ' * 34 + 'one of ' + ', '.join(map(repr, typing.get_args(hints[knob[1]]))))
        elif more:
            lines.append(' ' * 34 + more[1])
    return '\n'.join(lines)
