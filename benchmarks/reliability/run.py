"""Runs all campaigns and writes docs/reliability.md from their results.

python benchmarks/reliability/run.py                # all
python benchmarks/reliability/run.py kills faults   # some of them
python benchmarks/reliability/run.py --table-only   # the table, from results/
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CAMPAIGNS = {
    'faults': ([], 'faults of set-up and training, planted; sound runs beside them'),
    'shipped': ([], 'each config of configs/ trained with every guard on: not a word'),
    'teacher_check': ([], 'wrong teachers planted on images drawn anew; right ones beside them'),
    'pair_runs': (['--all'], 'each pair of networks trained with every guard on: not a word'),
    'kills': (['--kills', '200'], 'runs killed at random moments and resumed: equal to the bit'),
    'saves': ([], 'each file operation of a save failed, then resumed: equal to the bit'),
    'bad_input': (['--seeds', '1000'], 'bad annotation files, images and recipes'),
    'acceptance': ([], 'files that torch writes and reads: read too, equal to the bit'),
    'hostile': ([], 'hostile checkpoints, and every single bit of one flipped'),
    'fuzz': (['--seconds', '600'], 'checkpoints mutated by their structure'),
    'mutants': ([], 'small faults planted in what computes, each seen by a test'),
}
TEXT = """\
# What was tried to break a run

`python benchmarks/reliability/run.py` runs the campaigns and writes this table; the fast part of
each is in the tests. Lost is a case in which the promise did not hold.

| campaign | what is tried | tried | handled | lost | seconds |
| --- | --- | --- | --- | --- | --- |
"""


def table() -> str:
    """The page, from the committed results."""
    lines = []
    for name, (_, what) in CAMPAIGNS.items():
        path = HERE / 'results' / f'{name}.json'
        if not path.exists():
            lines.append(f'| `{name}.py` | {what} | not run | | | |\n')
            continue
        result = json.loads(path.read_text())
        figures = [result[key] for key in ('tried', 'handled', 'lost')]
        cells = ' | '.join(str(figure) for figure in figures)
        lines.append(f'| `{name}.py` | {what} | {cells} | {result["seconds"]:.0f} |\n')
    notes = []
    for name in CAMPAIGNS:
        path = HERE / 'results' / f'{name}.json'
        if path.exists():
            result = json.loads(path.read_text())
            notes += [f'- `{name}`: {note}.\n' for note in result['notes']]
            notes += [
                f'- `{name}`, lost: {row.get("id", row)}: {row.get("said", "")}\n'
                for row in result['rows']
                if row.get('held') is False or row.get('wrong')
            ]
    return TEXT + ''.join(lines) + '\n' + ''.join(notes)


def main() -> int:
    parser = argparse.ArgumentParser(description='Runs the campaigns of reliability')
    parser.add_argument('campaigns', nargs='*', metavar='CAMPAIGN')
    parser.add_argument('--table-only', action='store_true')
    args = parser.parse_args()
    if unknown := set(args.campaigns) - set(CAMPAIGNS):
        parser.error(f'{", ".join(sorted(unknown))}: the campaigns are {", ".join(CAMPAIGNS)}')
    failed = 0
    for name in () if args.table_only else args.campaigns or CAMPAIGNS:
        path = HERE / 'results' / f'{name}.json'
        command = [sys.executable, HERE / f'{name}.py', *CAMPAIGNS[name][0], '--json', path]
        failed |= subprocess.run(command).returncode
    (HERE.parents[1] / 'docs' / 'reliability.md').write_text(table())
    return failed


if __name__ == '__main__':
    sys.exit(main())
