"""Text in a terminal. A styled text is a list of (character, style), a style what an escape sequence holds."""
import itertools
import os
import shutil
import sys
import textwrap
import unicodedata

BOLD, DIM = '1', '2'
BLUE, ORANGE = ('', '117', '75', '33'), ('', '222', '215', '208')       # of the 256 colours, the strongest last
HIDDEN = 'Cc', 'Cf', 'Cs', 'Co', 'Zl', 'Zp'     # Unicode's categories of control characters and their like
SHAPING = '\n\u200c\u200d\u200e\u200f\u061c'    # joiners and marks of direction, which real writing needs


def printable(text):
    """Text that cannot move the cursor or reverse the line: control characters as escapes, line breaks kept."""
    return ''.join(c if c in SHAPING or unicodedata.category(c) not in HIDDEN else c.encode('unicode_escape').decode()
                   for c in text.replace('\t', '    '))


def colours():
    """Whether stdout is a terminal that wants them."""
    return sys.stdout.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'


def folded(text, hang=2):
    """A printable text whose lines fit the terminal: broken at white space but '\xa0', indented where one goes on."""
    text = printable(text)
    if sys.stdout.isatty():
        wrapper = textwrap.TextWrapper(shutil.get_terminal_size().columns, subsequent_indent=' ' * hang,
                                       break_on_hyphens=False)
        text = '\n'.join(wrapper.fill(line) for line in text.split('\n'))
    return text.replace('\xa0', ' ')


def styled(text, style=''):
    return [(character, style) for character in printable(text)]


def columns_of(letters):
    """Terminal columns of a styled text in one line: wide characters take two, combining ones none."""
    visible = [character for character, _ in letters if unicodedata.category(character) not in ('Mn', 'Me', 'Cf')]
    return len(visible) + sum(unicodedata.east_asian_width(character) in 'WF' for character in visible)


def wrap(letters, width):
    """The lines of a styled text, at most `width` columns each, broken at white space where there is any."""
    lines = [[]]
    for letter in letters:
        line = lines[-1]
        line.append(letter)
        if letter[0] == '\n' or columns_of(line) > width:
            end = max((i for i in range(1, len(line)) if line[i][0].isspace()), default=len(line) - 1)
            lines[-1:] = [line[:end], line[end + line[end][0].isspace():]]
    return lines


def paint(letters):
    """A styled text as a string, plain where no colours are wanted."""
    painted = ''
    for style, run in itertools.groupby(letters, key=lambda letter: letter[1]):
        text = ''.join(character for character, _ in run)
        painted += f'\x1b[{style}m{text}\x1b[0m' if style and colours() else text
    return painted


def say(*texts, file=None):
    """Print styled texts side by side, each wrapped in a column of its own."""
    width = max(8, (shutil.get_terminal_size().columns + 3) // len(texts) - 3)
    for line in itertools.zip_longest(*(wrap(text, width) for text in texts), fillvalue=[]):
        print(' | '.join(paint(part) + ' ' * (width - columns_of(part)) for part in line).rstrip(), file=file)


def tinted(pieces, limit):
    """The pieces of token_pieces as a styled text, tinted by the sum of their values: full at `limit`, orange below."""
    letters = []
    for text, values in pieces:
        value = sum(values) / limit
        ground = (BLUE if value > 0 else ORANGE)[round(3 * min(1, abs(value)))]
        if colours():                               # line breaks and the end get signs that can be tinted
            text = '∎' if text is None else text.replace('\n', '↵\n')
        letters += styled(text or '', f'38;5;16;48;5;{ground}' if ground else '')
    return list(itertools.dropwhile(lambda letter: letter[0].isspace(), letters))
