"""Text in a terminal. A styled text is a list of (character, style), a style what an escape sequence holds."""
import itertools
import os
import shutil
import sys
import unicodedata

from nanodpo.text import printable

BOLD, DIM = '1', '2'
BLUE, ORANGE = ('', '117', '75', '33'), ('', '222', '215', '208')       # of the 256 colours, the strongest last


def colours():
    """Whether stdout is a terminal that wants them."""
    return sys.stdout.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'


def styled(text, style=''):
    return [(character, style) for character in text]


def columns_of(letters):
    """Terminal columns of a styled text in one line: wide characters take two, combining ones none."""
    visible = [character for character, _ in letters if unicodedata.category(character) not in ('Mn', 'Me', 'Cf')]
    return len(visible) + sum(unicodedata.east_asian_width(character) in 'WF' for character in visible)


def wrap(letters, width):
    """The lines of a styled text, at most `width` columns each, broken at white space where there is any."""
    lines = [[]]
    for letter in letters:
        if letter[0] == '\n':
            lines.append([])
            continue
        line = lines[-1]
        line.append(letter)
        if columns_of(line) > width:
            spaces = [i for i in range(1, len(line)) if line[i][0].isspace()]
            end = spaces[-1] if spaces else len(line) - 1
            lines.append(line[end + 1:] if spaces else line[end:])
            del line[end:]
    return lines


def paint(letters):
    """A styled text as a string, plain where no colours are wanted."""
    painted = ''
    for style, run in itertools.groupby(letters, key=lambda letter: letter[1]):
        text = ''.join(character for character, _ in run)
        painted += f'\x1b[{style}m{text}\x1b[0m' if style and colours() else text
    return painted


def say(text, style='', file=None):
    """Print any text, wrapped, without what could move the cursor."""
    for line in wrap(styled(printable(text), style), shutil.get_terminal_size().columns):
        print(paint(line), file=file)


def say_side_by_side(left, right):
    """Print two lists of styled texts in two columns."""
    half = max(8, (shutil.get_terminal_size().columns - 3) // 2)
    for pair in zip(left, right):
        for a, b in itertools.zip_longest(*(wrap(letters, half) for letters in pair), fillvalue=[]):
            print(f'{paint(a)}{"":{half - columns_of(a)}} | {paint(b)}'.rstrip())


def tint(value):
    """The style of a value from -1 to 1: black on blue if it is positive, on orange if negative; '' near 0."""
    ground = (BLUE if value > 0 else ORANGE)[round(3 * min(1, abs(value)))]
    return f'38;5;16;48;5;{ground}' if ground else ''


def tinted(pieces, limit):
    """The pieces of token_pieces as a styled text. A piece is tinted by the sum of its values, over limit."""
    letters = []
    for text, values in pieces:
        shown = printable(text or '')
        if colours():                               # line breaks and the end get signs that can be tinted
            shown = '∎' if text is None else shown.replace('\n', '↵\n')
        letters += styled(shown, tint(sum(values) / limit))
    while letters and letters[0][0].isspace():
        del letters[0]
    return letters
