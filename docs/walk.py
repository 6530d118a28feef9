"""Runs every command and file of a page as a notebook, in a folder of its own.

python docs/walk.py README.md docs/tutorial.md     # ends with 1 at the first command that fails
python docs/walk.py docs/tutorial.md --write       # and writes docs/tutorial.ipynb

A ```python block whose first line is ``# NAME.py`` becomes that file, a ```sh block is run by bash.
Small networks and pictures stand in for those of the page (:data:`WALKS` and docs/walks/);
everything else is taken as it stands there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LINES = 25
"""The last lines of what a command prints that the notebook keeps."""
SECONDS = 1800
"""The longest that one block may take."""


@dataclass(frozen=True)
class Walk:
    """How a page is run.

    Attributes:
        before, after: scripts in docs/walks that are run first and last.
        stand_ins: texts of the page, and what stands in for each.
        left_out: how the commands begin that are not run, each with the reason.
    """

    before: str
    after: str = ''
    stand_ins: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


ZOO = 'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_1x_coco/'
WALKS = {
    'README.md': Walk(
        'readme', 'readme_after',
        left_out={
            'make demo': 'compares for minutes; `mmkd compare` is run on a smaller pair',
            'make test': 'is what runs the tests',
        },
    ),
    'docs/tutorial.md': Walk(
        'tutorial',
        stand_ins={
            'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': 'small.py',
            "depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')": 'base_channels=32',
            f'{ZOO}faster_rcnn_r101_fpn_1x_coco_20200130-f513f705.pth': 'zoo/teacher.pth',
            "depth=18, init_cfg=dict(checkpoint='torchvision://resnet18')":
            "base_channels=4,\n        init_cfg=dict(type='Pretrained', "
            "checkpoint='zoo/student_backbone.pth'),\n    ",
            '[64, 128, 256, 512]': '[4, 8, 16]',
        },
    ),
}  # fmt: skip
"""By page how it is run."""


def cells(page: str) -> list[dict[str, str]]:
    """The cells of a page's notebook, each with ``kind`` ('markdown' or 'code') and ``source``.

    Raises:
        ValueError: something that is to be replaced or left out is not on the page; a file stands
            there twice.
    """
    walk = WALKS[page]
    text = (ROOT / page).read_text(encoding='utf-8')
    unused = {*walk.stand_ins, *walk.left_out}
    found: list[dict[str, str]] = []
    files: set[str] = set()

    def add(kind: str, source: str) -> None:
        if source.strip():
            found.append(dict(kind=kind, source=source.strip('\n')))

    at = 0
    for block in BLOCK.finditer(text):
        language, body = block[1], block[2]
        name = re.match(r'# (\w+\.py)\n', body) if language == 'python' else None
        if language != 'sh' and name is None:
            continue
        add('markdown', text[at : block.start()])
        at = block.end()
        for given, instead in walk.stand_ins.items():
            if given in body:
                unused.discard(given)
                body = body.replace(given, instead)
        if name is not None:
            if name[1] in files:
                raise ValueError(f'{page}: {name[1]} stands there twice')
            files.add(name[1])
            add('code', f'%%writefile {name[1]}\n{body[name.end() :]}')
            continue
        run = []
        for line in body.replace('\\\n', ' ').splitlines():
            left = [start for start in walk.left_out if line.startswith(start)]
            unused.difference_update(left)
            run += [] if left else [re.sub(r'  +', '  ', line)]
        if any(line.strip() for line in run):
            add('code', '%%bash\nset -eo pipefail\n' + '\n'.join(run))
    add('markdown', text[at:])
    if unused:
        raise ValueError(f'{page} has nothing of {sorted(unused)}')
    scripts = [ROOT / f'docs/walks/{name}.py' for name in (walk.before, walk.after) if name]
    code = [dict(kind='code', source=path.read_text().strip('\n')) for path in scripts]
    first = next(i for i, cell in enumerate(found) if cell['kind'] == 'code')
    return found[:first] + code[:1] + found[first:] + code[1:]


def run(page: str, folder: Path) -> Any:
    """Executes a page's notebook in ``folder``, with all that its cells print.

    Raises:
        CellExecutionError: a command or a file failed.
    """
    import nbclient
    import nbformat
    from jupyter_client.manager import AsyncKernelManager

    notebook = nbformat.v4.new_notebook()
    notebook.metadata['kernelspec'] = dict(
        name='python3', display_name='Python 3', language='python'
    )
    for number, cell in enumerate(cells(page)):
        make = getattr(nbformat.v4, f'new_{cell["kind"]}_cell')
        notebook.cells.append(make(cell['source'], id=f'cell-{number}'))
    with tempfile.TemporaryDirectory() as own:
        # Sockets of files, which only this user can open.
        kernel = AsyncKernelManager(
            kernel_name='python3', transport='ipc', connection_file=f'{own}/kernel.json'
        )
        client = nbclient.NotebookClient(
            notebook, km=kernel, timeout=SECONDS, startup_timeout=600, record_timing=False,
            resources=dict(metadata=dict(path=str(folder))),
        )  # fmt: skip
        client.execute()
    return notebook


def shortened(notebook: Any, folder: Path) -> Any:
    """The notebook with the last lines of what each cell printed, and no path of this machine."""
    for cell in notebook.cells:
        if cell.cell_type != 'code':
            continue
        text = ''.join(output.get('text', '') for output in cell.outputs)
        for path, name in ((folder, '.'), (ROOT, 'mmkd'), (Path(sys.prefix), 'python')):
            text = text.replace(str(path), name)
        lines = re.sub(r'\x1b\[[0-9;]*m', '', text).splitlines()
        if len(lines) > LINES:
            lines = ['...', *lines[-LINES:]]
        said = dict(output_type='stream', name='stdout', text='\n'.join(lines) + '\n')
        cell.outputs = [said] if lines else []
    return notebook


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Runs every command and file of a page')
    parser.add_argument('pages', nargs='+', choices=list(WALKS), metavar='PAGE')
    parser.add_argument('--write', action='store_true', help='write PAGE.ipynb beside each')
    args = parser.parse_args(argv)
    # The commands of the page are this interpreter's, of this checkout.
    os.environ['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    os.environ['PYTHONPATH'] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    )
    os.environ.setdefault('MPLBACKEND', 'agg')  # else a kernel's own reaches the commands
    for page in args.pages:
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(page, Path(folder))
            notebook = shortened(notebook, Path(folder))
        if args.write:
            path = (ROOT / page).with_suffix('.ipynb')
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')
        print(f'{page}: {sum(cell.cell_type == "code" for cell in notebook.cells)} blocks were run')
    return 0


if __name__ == '__main__':
    sys.exit(main())
