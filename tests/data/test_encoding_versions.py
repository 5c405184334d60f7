"""Code that gives something to encoded samples changes only with its file's VERSION: caches know encoders by these.

python -m tests.data.test_encoding_versions    writes the record, tests/data/encoding_versions.json
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import hashlib
import json
from pathlib import Path

import pytest

from ppdiffusers_train.data.encoders_key import AROUND, METHODS
from ppdiffusers_train.data.source_code import PACKAGE, file_of, is_of_package, reached, source_of
from tests.conftest import load_script, module_class
from tests.test_architecture import SCRIPTS

RECORD = Path(__file__).with_name("encoding_versions.json")


def functions_by_file():
    """{file of the package: {source of each of its functions that a script's encoding reaches}}, and their VERSIONs."""
    sources, versions = {}, {}
    for script in SCRIPTS:
        job = module_class(load_script(script))
        for function in filter(is_of_package, reached(job, METHODS, AROUND)):
            name = file_of(function).relative_to(PACKAGE).as_posix()
            sources.setdefault(name, set()).add(source_of(function, job))
            versions[name] = function.__globals__.get("VERSION")
    return sources, versions


def record_of(sources, versions):
    digests = {
        name: hashlib.blake2b("\n".join(sorted(found)).encode(), digest_size=8).hexdigest()
        for name, found in sources.items()
    }
    return {name: f"version {versions[name]}, code {digests[name]}" for name in sorted(sources)}


@pytest.mark.once
def test_code_in_reach_of_an_encoding_changes_with_its_version():
    sources, versions = functions_by_file()
    assert not (lacking := [name for name, version in versions.items() if not version]), f"no VERSION in {lacking}"
    now, recorded = record_of(sources, versions), json.loads(RECORD.read_text())
    changed = [name for name in {*now, *recorded} if now.get(name) != recorded.get(name)]
    assert not changed, (
        f"functions that encode samples have changed in {changed}: if they give other values now, raise the VERSION "
        f"there, so that no cache mixes these with the old ones; in any case, then write the record anew ({__doc__})"
    )


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record_of(*functions_by_file()), indent=1) + "\n")
