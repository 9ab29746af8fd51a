"""A prompt that is too long loses its first turns. A system turn stays. The last turn is cut from the left if needed.

A conversation begins with a turn of the user again, so some room may be left. A text without turns fills its room.
"""
import array
import os
import re

from nanodpo.text import prompt_ids, render, text_ids


def shorten(row, ids, room, tokenizer, template):
    """The ids of a prompt, `room` of them at most, whose whole ids are more."""
    text = row.prompt
    for text in shorter(row, template):
        ids = prompt_ids(tokenizer, text, template)
        if len(ids) <= room:
            return ids
    at = last_turn(row, text, template)
    before = prompt_ids(tokenizer, text[:at], template) if at else []       # a system turn, and the frame
    left = room - len(before)
    return array.array('I', [*before, *text_ids(tokenizer, text[at:])[-left:]] if at and left > 0 else ids[-room:])


def shorter(row, template):
    """The texts of a prompt that begin with its second turn of the user, its third, and so on."""
    turns = row.turns or []
    system = turns[:turns[:1] != [] and turns[0]['role'] == 'system']
    starts = [i for i, turn in enumerate(turns) if turn['role'] == 'user'][1:]
    yield from (render(system + turns[i:], template) for i in starts)
    if row.dialogue and not turns:
        starts = [match.start() for match in re.finditer('\n\nHuman:', row.prompt)]
        yield from (row.prompt[at:] for at in starts if at > 0)


def last_turn(row, text, template):
    """Where what the user said last begins in the text of a prompt. Without turns, it is all behind the frame."""
    if row.dialogue and not row.turns:
        return text.rfind('\n\nHuman:') + len('\n\nHuman:')
    if row.turns:
        at = text.rfind(row.turns[-1]['content'].strip())
    else:
        at = len(os.path.commonprefix([text, render('', template)]))
    return len(text[:at].rstrip(' '))
