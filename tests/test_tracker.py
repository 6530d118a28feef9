"""docs/tracker.md is up to date, knows every thread, and each test that it names is collected."""

import runpy
import subprocess
import sys

import tracker


def test_the_page_is_what_the_table_says():
    assert (tracker.ROOT / 'docs/tracker.md').read_text() == tracker.text()


def test_each_named_test_is_collected(collected):
    named = {f'tests/{node.partition("::")[0]}' for node in tracker.nodes()}
    if not named <= {name.partition('::')[0] for name in collected}:  # a part of the suite is run
        said = subprocess.run(
            [sys.executable, '-m', 'pytest', '--collect-only', '-q', '-p', 'no:cacheprovider',
             *sorted(named)],
            cwd=tracker.ROOT, text=True, capture_output=True, timeout=600,
        ).stdout  # fmt: skip
        collected = set(said.splitlines())
    assert [node for node in tracker.nodes() if f'tests/{node}' not in collected] == []


def test_every_thread_has_a_row_and_no_row_another():
    known = tracker.threads(tracker.THREADS)
    assert len(known) == len(set(known))
    assert {thread for row in tracker.ROWS for thread in tracker.threads(row[0])} == set(known)


def test_what_is_open_says_why_and_cells_stay_cells():
    for row in (*tracker.ROWS, *tracker.SILENT, *tracker.MACHINE, *tracker.SETUP):
        assert all(row[:-1]) and not any('|' in (cell or '') for cell in row), row


def test_the_page_on_reliability_is_what_the_results_say():
    page = runpy.run_path(str(tracker.ROOT / 'benchmarks/reliability/run.py'))['table']()
    assert (tracker.ROOT / 'docs/reliability.md').read_text() == page
