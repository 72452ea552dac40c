"""The contract of a skipped file: it is listed with its reason, and nothing else changes."""

import re
from itertools import chain


def assert_only_skipped(data, name, message):
    """Exactly the signal `name` is missing from the dataset, with a reason of one line that matches `message`.

    The split of the others is the one that was made of all files.
    """
    assert list(data.about["skipped"]) == [name]
    reason = data.about["skipped"][name]
    assert re.search(message, reason), reason
    assert len(reason.splitlines()) == 1
    ids = {split: list(part.annotations().ids) for split, part in data.splits.items()}
    assert name not in chain(*ids.values())
    if "split" in data.about:
        planned = data.about["split"]
        assert name in chain(*planned.values())
        assert ids == {split: [one for one in planned[split] if one != name] for split in ids}
