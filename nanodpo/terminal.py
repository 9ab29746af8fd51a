"""Text in a terminal: how wide it is, where its lines break, which colours it has.

A styled text is a list of (character, style). A style is what its escape sequence holds, '' for none.
"""
import itertools
import os
import re
import shutil
import sys
import unicodedata

from nanodpo.text import printable

BOLD, DIM = '1', '2'


def colours():
    """Whether stdout is a terminal that wants them."""
    return sys.stdout.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'


def terminal_width():
    return max(20, shutil.get_terminal_size().columns)


def styled(text, style=''):
    return [(character, style) for character in text]


def columns_of(text):
    """Terminal columns of a text without line breaks: wide characters take two, combining ones none."""
    columns = 0
    for character in text:
        if unicodedata.category(character) not in ('Mn', 'Me', 'Cf'):
            columns += 2 if unicodedata.east_asian_width(character) in 'WF' else 1
    return columns


def wrap(letters, width):
    """The lines of a styled text, at most `width` columns each. They break between words where there are any."""
    lines, text = [], ''.join(character for character, _ in letters)
    for paragraph in re.finditer(r'(?m)^.*$', text):
        start = end = paragraph.start()
        for word in re.compile(r'\s*(\S+)').finditer(text, start, paragraph.end()):
            if end > start and columns_of(text[start:word.end()]) > width:
                lines.append(letters[start:end])
                start = end = word.start(1)
            for i in range(end, word.end()):        # a word that is wider than a line is broken
                if columns_of(text[start:i + 1]) > width:
                    lines.append(letters[start:i])
                    start = i
            end = word.end()
        lines.append(letters[start:end])
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
    for line in wrap(styled(printable(text), style), terminal_width()):
        print(paint(line), file=file)


def side_by_side(left, right, width):
    """The lines of two lists of styled texts: in two columns, or below one another if the terminal has less than 60."""
    if width < 60:
        return [paint(line) for letters in left + right for line in wrap(letters, width)]
    half, lines = (width - 3) // 2, []
    for pair in zip(left, right):
        for a, b in itertools.zip_longest(*(wrap(letters, half) for letters in pair), fillvalue=[]):
            padding = half - columns_of(character for character, _ in a)
            lines.append(f'{paint(a)}{"":{padding}} | {paint(b)}'.rstrip())
    return lines


def tint(value):
    """The style of a value from -1 to 1: black on blue if it is positive, on orange if negative, '' if near 0."""
    strength = round(3 * min(1, abs(value)))
    if strength == 0:
        return ''
    light = 5 - strength
    red, green, blue = (light - 2, light, 5) if value > 0 else (5, light, light - 2)
    return f'38;5;16;48;5;{16 + 36 * red + 6 * green + blue}'       # of the 256 colours, a cube of 6 x 6 x 6


def tinted(pieces, limit):
    """The pieces [(text, values)] of a text as a styled text, each tinted by the sum of its values, in units of limit.

    A line break and the end token, whose text is None, get a sign that can be tinted.
    """
    letters = []
    for text, values in pieces:
        shown = '∎' if text is None else printable(text).replace('\n', '↵\n')
        letters += styled(shown, tint(sum(values) / limit))
    text = ''.join(character for character, _ in letters)
    return letters[len(text) - len(text.lstrip()):len(text.rstrip())]
