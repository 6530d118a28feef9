"""docs/tracker.md is up to date, and each test that it names exists."""

import re
import runpy

import tracker


def test_the_page_is_what_the_table_says():
    assert (tracker.ROOT / 'docs/tracker.md').read_text() == tracker.text()


def test_each_named_test_exists():
    for threads, *_, test in tracker.ROWS:
        if test != tracker.OPEN:
            file, _, name = test.partition('::')
            source = (tracker.ROOT / 'tests' / file).read_text()
            assert re.search(rf'^def {name}\(', source, re.MULTILINE), (threads, test)


def test_the_page_on_reliability_is_what_the_results_say():
    page = runpy.run_path(str(tracker.ROOT / 'benchmarks/reliability/run.py'))['table']()
    assert (tracker.ROOT / 'docs/reliability.md').read_text() == page
