"""Writes the tables of docs/methods.md from docstrings of the methods and what was measured.

What each is worth is read from the results of benchmarks/study/methods.py.

python benchmarks/step.py digits --cpu-time --recipe all --json benchmarks/methods.json
python benchmarks/step.py r101_to_r50 --rounds 4 --recipe all --json r101.json  # its rows too
python benchmarks/methods.py
"""

import contextlib
import functools
import json
import re
import textwrap
from pathlib import Path

from mmengine.config import Config

from mmkd.analysis.comparison.table import markdown_table, mean_sd
from mmkd.analysis.study import read_summaries
from mmkd.analysis.study.statistics import contrast_interval
from mmkd.analysis.study.table import Line, StageSummary, ends, signed
from mmkd.layer_pairs import SIZE, Layer, LayerPair
from mmkd.methods import METHODS
from mmkd.recipe import read_recipe
from mmkd.registry import build_terms

ROOT = Path(__file__).resolve().parents[1]
COSTS = ROOT / 'benchmarks/methods.json'
RECIPES = sorted(
    p.stem for p in (ROOT / 'configs/_base_').glob('*.py') if p.stem not in ('chen2017', 'mmkd')
)

PAIRS = {'digits': 'digits', 'r101_to_r50': 'R101 → R50'}
PAGE = ROOT / 'docs/methods.md'


def sections(method: type) -> dict[str, str]:
    """The parts of a docstring: what, paper, formula, shapes, and the lines with a name."""
    blocks = textwrap.dedent('    ' + method.__doc__).strip().split('\n\n')
    found = {'what': blocks[0], 'paper': blocks[1]}
    math = next(i for i, block in enumerate(blocks) if block.startswith('.. math::'))
    found['formula'] = textwrap.dedent(blocks[math].replace('.. math::', '        ', 1))
    named = next(i for i, block in enumerate(blocks) if block.startswith('Needs:'))
    found['shapes'] = ' '.join(blocks[math + 1 : named])
    for line in re.split(r'\n(?=\S)', blocks[named]):
        name, _, text = line.partition(':')
        found[name] = text
    return {name: _in_markdown(text) for name, text in found.items()}


def _in_markdown(text: str) -> str:
    text = re.sub(r'\s+', ' ', text).strip()
    return re.sub(r':class:`(\w+)`', r'`\1`', text).replace('``', '`')


def parameters(recipe: str) -> int:
    """Of a recipe's terms, between necks of 256 channels."""
    terms = build_terms(read_recipe(distillation(recipe)).terms)
    pairs = []
    for level in range(5):
        layer, shape = Layer('neck', level), (1, 256, SIZE // (4 << level), SIZE // (4 << level))
        pairs.append(LayerPair(f'neck_{level}', layer, layer, (shape, shape)))
    count = 0
    for term in terms.values():
        entries = term.needs().pairs
        term.strides = [4.0, 8.0, 16.0, 32.0, 64.0]
        term.bind(pairs if 'neck' in entries else pairs[: len(entries)])
        count += sum(p.numel() for p in term.parameters())
    return count


def distillation(recipe: str) -> dict:
    return Config.fromfile(ROOT / f'configs/_base_/{recipe}.py').distillation.to_dict()


def recipes_of(method: type) -> list[str]:
    """The recipes that the class is in, its own first."""
    name = method.__name__
    found = [r for r in RECIPES if any(t['type'] == name for t in distillation(r).values())]
    return sorted(found, key=lambda r: (len(r), r))


def table() -> str:
    results = json.loads(COSTS.read_text()) if COSTS.exists() else []
    costs = {(r['recipe'], r['pair']): r for r in results}
    pairs = list(dict.fromkeys(r['pair'] for r in results))
    names = [PAIRS[pair] for pair in pairs]
    columns = ['class and formula', 'paper', 'recipe', 'needs', 'parameters', *names]
    lines = ['| ' + ' | '.join(columns) + ' |', '| --- ' * len(columns) + '|']
    seen = set()
    for method in METHODS:
        for recipe in recipes_of(method):
            if recipe in seen:
                continue
            seen.add(recipe)
            count = parameters(recipe)
            of = sections(method)
            cells = [f'[{method.__name__}](#{method.__name__.lower()})', cited(of['paper'])]
            cells += [f'`{recipe}.py`', of['Needs'].rstrip('.')]
            cells += [f'{count / 1e6:.2f} M' if count else 'none']
            for pair in pairs:
                cost = costs.get((recipe, pair))
                cells.append(
                    f'{cost["above_hints_ms"]:+.0f} of {cost["milliseconds"]["hint"]:.0f} ms, '
                    f'{cost["above_hints_mb"]:+.0f} MB'
                    if cost
                    else ''
                )
            lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join([*lines, *measured(results)])


def measured(results: list[dict]) -> list[str]:
    """How the costs came about."""
    said = {}
    for r in results:
        kind = 'CPU time' if r['clock'] == 'process_time' else 'time'
        height, width = r['size']
        said[r['pair']] = (
            f'{PAIRS[r["pair"]]}: {kind} of {r["images"]} images of {height}×{width} pixels, '
            f'medians of {r["rounds"]} rounds'
        )
    return ['', '; '.join(said.values()) + '.'] if said else []


STUDY = 'benchmarks/study/methods'
SEARCHED, WHOLE, STARTED = 'half', 'whole', 'start'
"""The stages of that study: one seed and half the schedule, then the better half's runs."""


@functools.cache
def stages() -> dict[str, StageSummary]:
    with contextlib.chdir(ROOT):  # the configs' paths are relative to it
        found = read_summaries(f'{STUDY}.py', f'{STUDY}.jsonl')
    return {summary.stage.name: summary for summary in found}


def gain(stage: str, line: Line) -> str:
    """What an arm gains over the stage's reference, with its interval among the stage's arms."""
    summary = stages()[stage]
    pooled = summary.pooled('')
    if line.gain is None or pooled is None or not summary.complete(line):
        return ''
    return f'{signed(line.gain)} {ends(contrast_interval(line.gain, pooled, pooled.arms - 1))}'


def results() -> str:
    """The arms of the study, each at the value that the search chose: the best of the last stage
    first."""
    found = stages()
    rows = []
    for line in found[SEARCHED].of(''):
        arm, rank = line.arm, []
        if line is not found[SEARCHED].find('', arm):
            continue
        value = ', '.join(v.partition('=')[2] for v in line.entry.variant.values)
        cells = [
            f'`{arm}`',
            value.replace('None', "the authors'"),
            mean_sd([*line.by_seed.values()]),
        ]
        for stage in (WHOLE, STARTED):
            later = found[stage].find('', arm) if stage in found else None
            if later is None or not later.by_seed:
                cells += ['', '']
                continue
            cells += [mean_sd([*later.by_seed.values()]), gain(stage, later)]
            rank.append(-sum(later.by_seed.values()) / len(later.by_seed))
        searched = -max(line.by_seed.values(), default=0.0)
        rows.append(((-len(rank), *rank[::-1], searched), cells))
    head = ['arm', 'share or rate', 'half schedule, one seed', 'whole schedule', 'over plain',
            "with the teacher's start", 'over that start']  # fmt: skip
    return markdown_table(head, [cells for _, cells in sorted(rows)])


def result_of(recipe: str) -> str:
    """What one recipe came to, in a sentence."""
    found, said = stages(), []
    line = found[SEARCHED].find('', recipe)
    plain = found[SEARCHED].find('', 'plain')
    for stage, words in ((WHOLE, 'over plain'), (STARTED, "over the teacher's start")):
        later = found[stage].find('', recipe) if stage in found else None
        if later is not None and (told := gain(stage, later)):
            said.append(f'{told} {words}')
    if said:
        return ', '.join(said)
    least = [max(x.by_seed.values(), default=None) for x in (line, plain)]
    if None in least:
        return 'none yet'
    difference = signed(least[0] - least[1])
    return f'{difference} after half the schedule with one seed, not among the better half'


def cited(paper: str) -> str:
    """Authors, venue and year of the first paper that a docstring names."""
    quoted = re.search(r'([A-Z][\w ,]+?(?: et al\.| and \w+)?), "[^"]*", ([^,;.]*\d{4})', paper)
    return f'{quoted[1]}, {quoted[2]}' if quoted else paper


def methods() -> str:
    found = []
    for method in METHODS:
        of = sections(method)
        recipes = ', '.join(f'`configs/_base_/{r}.py`' for r in recipes_of(method))
        lines = [
            f'### {method.__name__}', of['what'], of['paper'],
            f'```math\n{of["formula"]}\n```', of['shapes'],
            f'- Needs: {of["Needs"]}\n- Parameters: {of["Parameters"]}\n'
            f'- Public code: {of["Public code"]}\n- Defaults: {of["Defaults"]}\n'
            f'- Recipe: {recipes or "an entry of `defeat.py`"}\n'
            f'- Our result: {own_results(method)}',
        ]  # fmt: skip
        found.append('\n\n'.join(_wrapped(line) for line in lines if line))
    return '\n\n'.join(found)


def own_results(method: type) -> str:
    found = recipes_of(method) or ['defeat']  # DeFeatHead is an entry of that one
    if len(found) == 1:
        return f'{result_of(found[0])} ([the table](#what-each-is-worth))'
    said = '; '.join(f'`{recipe}.py` {result_of(recipe)}' for recipe in found)
    return f'{said} ([the table](#what-each-is-worth))'


def _wrapped(text: str) -> str:
    if text.startswith(('```', '###')):
        return text
    return '\n'.join(
        textwrap.fill(line, 100, subsequent_indent='  ' if line.startswith('- ') else '',
                      break_on_hyphens=False, break_long_words=False)
        for line in text.split('\n')
    )  # fmt: skip


def page() -> str:
    """The text of docs/methods.md, with its generated blocks anew."""
    text = PAGE.read_text(encoding='utf-8')
    for name, block in (('table', table()), ('results', results()), ('methods', methods())):
        begin, end = f'<!-- {name}: python benchmarks/methods.py -->\n', '\n<!-- end -->'
        before, _, rest = text.partition(begin)
        text = before + begin + block + end + ('\n' + rest).partition(end)[2]
    return text


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
