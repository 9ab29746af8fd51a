#!/usr/bin/env bash
# From a clone to an aligned model: set up, write the data, SFT, DPO, and look at before and after.
#     bash quickstart.sh
# Makes .venv unless a virtual environment is active. Needs python3 (3.10 or newer) and the package index; safe to
# run twice: an installed environment and prepared data are used again, trained models are moved to sft.1, dpo.1, ....
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

total=0
for stage in prepare_prefs sft dpo sample; do
    printf '\n== python %s.py config/reviews.py\n' "$stage"
    SECONDS=0
    python $stage.py config/reviews.py
    echo "== $stage.py took $SECONDS s"
    total=$((total + SECONDS))
done
printf '\n== the four stages took %s s; python sample.py --prompt="The Paper Clock is" goes on from here\n' "$total"
