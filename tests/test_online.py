"""Pairs drawn from a policy: what is written is what an independent drawing, scoring and pairing of the same prompts gives."""
import json
import os
import sys

import numpy as np
import pytest
import torch

import prepare_prefs
from conftest import ROOT, random_groups, run_stage, small_gpt, write_data
from prepare_prefs import Groups, read_meta, write_groups


def as_lists(groups):
    return [[piece.tolist() for piece in group] for group in groups]


def test_written_groups_are_read_back_and_replace_a_set_whole_or_not_at_all(experiment):
    rng = np.random.default_rng(1)
    splits = {'train': random_groups(30, 3, rng), 'val': random_groups(5, 3, rng, ends=False)}
    meta = write_groups('data/three', 'data/tiny', splits, {'train': {'tied': 4}}, who='me')
    for split, groups in splits.items():
        assert as_lists(Groups('data/three', split)) == groups
    assert Groups('data/three', 'train').vocabulary == Groups('data/tiny', 'train').vocabulary
    assert meta == read_meta('data/three') and meta['who'] == 'me' and meta['max_length'] == 64
    assert meta['splits']['train']['read'] == 34 and meta['splits']['val']['dropped'] == {}
    cut = sum(piece[-1] != 256 for group in splits['val'] for piece in group[1:])
    assert meta['splits']['val']['truncated']['responses'] == cut > 0 == meta['splits']['train']['truncated']['responses']
    before = {path.name: path.read_bytes() for path in (experiment / 'data/three').iterdir()}
    with pytest.raises(AssertionError, match='max_length'):
        write_groups('data/three', 'data/tiny', splits | {'val': [[[1] * 60, [2] * 5, [3], [4]]]})
    assert before == {path.name: path.read_bytes() for path in (experiment / 'data/three').iterdir()}
