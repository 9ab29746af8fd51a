#!/usr/bin/env bash
# Set up as quickstart.sh does, then run the tests.
#     bash test.sh                    # all
#     bash test.sh -k packed          # arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")"

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -e .venv/nanodpo-requirements.txt ] || python3 -m venv .venv
    . .venv/bin/activate
fi
# install once for each requirements.txt
if ! cmp -s requirements.txt "$VIRTUAL_ENV/nanodpo-requirements.txt"; then
    echo "installing requirements.txt into $VIRTUAL_ENV"
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$VIRTUAL_ENV/nanodpo-requirements.txt"
fi

# two at a time: each takes one thread, and most of them wait for processes that they have started
python -m pytest -q -n 2 --dist=worksteal tests "$@"
