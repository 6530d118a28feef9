"""How each campaign ends: its counts, in words and as JSON."""

import json
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def report(
    name: str, tried: int, lost: int, start: float, notes: list[str], rows: list, path: str | None
) -> int:
    """Say what was counted and write it down.

    Args:
        name: of the campaign.
        tried: cases.
        lost: of these, the ones in which the promise did not hold.
        start: ``time.perf_counter()`` at the beginning.
        notes: what else was counted.
        rows: the cases, or a summary of them.
        path: the JSON; None writes none.

    Returns:
        The exit status: 1 if a case was lost.
    """
    print(f'{name}: {tried - lost} of {tried} held', *notes, sep='\n')
    result = {
        'name': name,
        'tried': tried,
        'handled': tried - lost,
        'lost': lost,
        'seconds': round(time.perf_counter() - start, 1),
        'command': 'python ' + shlex.join(sys.argv).replace(f'{ROOT}/', ''),
        'notes': notes,
        'rows': rows,
    }
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + '\n')
    return int(lost > 0)
