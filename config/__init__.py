"""One experiment, one config file; a flag overrides it: python dpo.py config/hh.py --beta=0.2

A config file is Python: `name = 'hh'` and one dict a stage. It may also hold functions, imports, CAPITALS and _private
names. Files are read first, in order, then flags. Without a file and `--name`, config/reviews.py is run.

A stage declares its knobs in a dataclass. The annotation is a type, In[number, 'rule about x'] or Literal['a', 'b'];
the comment beside the knob is what `--help` prints.
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import json
import os
import pathlib
import re
import runpy
import signal
import sys
import textwrap
import time
import traceback
import typing
from typing import Annotated as In, Literal

NAMES = ('name', 'prepare', 'sft', 'dpo', 'sample')     # what a config file sets: the experiment's name, and stages
NAME = r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}'
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]  # the signals that end a stage
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:   # under nohup
    STOPS.remove(signal.SIGHUP)
AT_END = contextlib.ExitStack()                         # what is called when a stage ends, also by an error
EMBEDDED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'reviews.py')


class UserError(SystemExit):
    """A user's mistake. `run` prints it as one line, without a traceback, and the exit status is 1."""
    def __init__(self, message):
        printable = (c if c.isprintable() else ascii(c)[1:-1] for c in ' '.join(str(message)[:2000].split()))
        self.message = ''.join(printable)               # no control characters of somebody's data
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
    except (UserError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:                  # also sys.exit in a user's file, and a panic of Rust's
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f' ({path} line {lines[-1]})' if lines else ''
        sentence = str(error).split('. ')[0]        # torch's next one tells how to run code from a checkpoint
        raise UserError(f'{what}: {type(error).__name__}: {sentence[:300]}{where}') from None


def stopped(number, frame):
    """A signal that comes before there is anything to save: one line, then what the signal does."""
    if os.environ.get('RANK', '0') == '0':
        os.write(2, f'error: stopped by {signal.Signals(number).name}, nothing new was saved\n'.encode())
    AT_END.close()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def run(main):
    """Call main(). A UserError or OSError, such as of a full disk, ends it with one line on stderr, status 1."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name) or open(os.devnull, 'w')        # it may be closed, or know few characters
        stream.reconfigure(errors='backslashreplace', line_buffering=True)      # a log file grows with its run
        setattr(sys, name, stream)
    for number in STOPS:
        signal.signal(number, stopped)
    try:
        main()
        AT_END.close()
        return sys.stdout.flush()                       # now, to see a full disk or a closed pipe
    except UserError as error:
        message = error.message
    except KeyboardInterrupt:
        message = 'stopped'
    except RuntimeError as error:
        if type(error).__name__ != 'OutOfMemoryError':      # torch's, of a GPU
            raise
        message = 'the GPU is out of memory: lower --row_tokens, or see Trouble in README.md'
    except OSError as error:
        message = UserError(f'{error.strerror or error}: {error.filename or "standard output, or a file"}').message
    AT_END.close()
    rank = os.environ.get('RANK', '0')
    if rank != '0':     # most errors meet all ranks: rank 0 speaks, and torchrun ends the others while they wait
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5 if os.environ.get('LOCAL_RANK') == '0' else 7)
        message = f'rank {rank} on {os.uname().nodename}: {message}'
    print(f'error: {message}', file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        if 'TORCHELASTIC_ERROR_FILE' in os.environ:     # what torchrun prints last
            report = json.dumps(dict(message=f'error: {message}', timestamp=int(time.time())))
            pathlib.Path(os.environ['TORCHELASTIC_ERROR_FILE']).write_text(report)
        sys.stdout.flush()
    os._exit(1)         # python's own exit would wait for gloo's threads, and complain once more of a closed pipe


def nearest(key, known):
    close = difflib.get_close_matches(str(key), known, 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def check_value(key, value, annotation, where):
    """`value`, or the text of a flag, as the annotated type. A UserError names the key and where it came from."""
    choices = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        need(value in choices, f"{where}: {key}={value!r:.80} must be one of {', '.join(map(repr, choices))}")
        return value
    kind, *rules = choices or [annotation]
    if where == 'flag' and kind is not str:
        with contextlib.suppress(ValueError, SyntaxError):      # then the type check says what is wrong with it
            value = ast.literal_eval(value.capitalize())        # true is True
    setting = f'{where}: {key}={value!r:.80}'
    if kind is float and type(value) is int:
        value = float(value)
    need(type(value) is kind, f'{setting} must be {kind.__name__}, not {type(value).__name__}')
    for rule in rules:
        need(eval(rule, {}, {'x': value}), f'{setting} is out of range: {rule.replace("x", key)}')
    return value


def check_settings(settings, argv, hints, stage):
    """{key: value}, {key: where it came from} of settings, [(where, key, value)], and then of the flags in argv."""
    values, origin = {}, {}
    for flag in [a for a in argv if a.startswith('-')]:
        key, equals, text = flag.removeprefix('--').partition('=')
        need(equals or hints.get(key, bool) is bool, f'flag {flag} needs a value: --{key}=...')
        settings = [*settings, ('flag', key, text if equals else 'True')]
    for where, key, value in settings:
        need(key in hints, f"{where}: unknown key '{key}' for {stage}{nearest(key, hints)}")
        values[key] = check_value(key, value, hints[key], where)
        origin[key] = where
    for key in ('name', 'run_name'):        # they name folders
        need(re.fullmatch(NAME, values.get(key, key)),
             f"{key}={values.get(key)!r:.80} must be at most 100 letters, digits, '.', '_' or '-'")
    return values, origin


def check_flags(script, stage):
    """Check the flags of a stage before it imports torch, which takes seconds: by the lines of its Config."""
    hints = {}
    for knob, annotation in re.findall(r'(?m)^    (\w+): (.+?) = ', pathlib.Path(script).read_text(encoding='utf-8')):
        hints[knob] = str
        with contextlib.suppress(NameError):            # it needs an import: `load` checks this one
            hints[knob] = eval(annotation)
    if not {'-h', '--help'} & set(sys.argv):
        run(lambda: check_settings([], sys.argv[1:], hints, stage))


def load(Config, stage, argv=None):
    """The config of `stage`: Config's defaults, then files, then flags. `--help` prints the knobs and exits.

    Its `origin` maps each key that was set to where it came from. Its `functions` are those of the files: {name: f}.
    """
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(help_text(Config, stage))
        raise SystemExit(0)
    hints = typing.get_type_hints(Config, include_extras=True)
    argv = data_flags(argv, stage)
    files = [a for a in argv if not a.startswith('-')]
    if not files and not any(a.startswith('--name=') for a in argv):
        files = [EMBEDDED]
    settings, functions = [], {}                        # settings: (where it came from, key, value)
    for path in files:
        need(os.path.isfile(path), f'config file {path} does not exist (a flag is written --key=value)')
        with one_line(f'config file {path}', path):
            names = runpy.run_path(path)
        for key, value in names.items():
            if callable(value):
                functions[key] = value
            elif key == 'name':
                settings.append((path, key, value))
            elif key == stage:
                need(isinstance(value, dict), f"config file {path}: '{key}' must be a dict")
                settings += [(path, *item) for item in value.items()]
            elif not key.startswith('_') and not key.isupper() and not inspect.ismodule(value):
                need(key in NAMES, f"config file {path}: unknown name '{key}'{nearest(key, NAMES)}")
    values, origin = check_settings(settings, argv, hints, stage)
    config = Config(**values)
    config.origin = origin
    config.functions = functions
    return config


def data_flags(argv, stage):
    """The arguments, with --source=FILE in place of a FILE of data. Only a .py file is ever run.

    Data without a --name and a config file are called as the file is, never as the quickstart's.
    """
    data = [a for a in argv if not a.startswith('-') and not a.endswith('.py')]
    need(not data or stage == 'prepare' and (os.path.exists(data[0]) or '=' not in data[0]),
         f'{"".join(data[:1])} is no config file: such a file ends in .py (a flag is written --key=value)')
    argv = [f'--source={a}' if a in data else a for a in argv]
    sources = [a.removeprefix('--source=') for a in argv if a.startswith('--source=')]
    need(len(sources) < 2 or not data, f'more than one source: {", ".join(sources)}')
    named = any(a.startswith('--name=') or not a.startswith('-') for a in argv)
    if stage == 'prepare' and sources and not named:
        stem = os.path.basename(sources[-1].rstrip('/')).partition('.')[0]
        argv.append('--name=' + re.sub('[^A-Za-z0-9_-]+', '_', stem))
    return argv


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
    for line in inspect.getsource(Config).splitlines():
        code, _, comment = line.partition('# ')
        knob = re.match(r'    (\w+): .*? = (.*?) *$', code)
        if knob or code.isspace():
            flag = f'  --{knob[1]}={knob[2]}' if knob else ''
            lines.append(f'{flag:33} {comment}')
        if knob and typing.get_origin(Config.__annotations__[knob[1]]) is Literal:
            choices = ', '.join(map(repr, typing.get_args(Config.__annotations__[knob[1]])))
            lines += textwrap.wrap(f'one of {choices}', 100, initial_indent=' ' * 34, subsequent_indent=' ' * 34)
    return '\n'.join(lines)
