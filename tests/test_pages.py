"""README and docs: generated parts are new, links lead somewhere, commands run, the site builds."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from mmengine.config import Config

from mmkd.commands import new_pair
from mmkd.recipe import read_recipe
from mmkd.registry import build_terms

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f'docs/{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generate, walk = script('generate'), script('walk')


NETWORK = "_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'\n"
PAIR = """\
_base_ = ['your_student.py', __import__('mmkd').base('chen2017')]
model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector', teacher_config='your_teacher.py',
    teacher_ckpt='random', distillation=_base_.distillation)
"""
CONFIGS = [
    pytest.param(block[1], id=f'{page.stem} {number}')
    for page in sorted((ROOT / 'docs').glob('*.md'))
    for number, block in enumerate(walk.BLOCK.findall(page.read_text()))
    if block[1].startswith('_base_')
]


@pytest.mark.parametrize('block', CONFIGS)
def test_the_configs_of_a_page_are_recipes(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('your_student', 'your_teacher', 'my_student', 'my_teacher'):
        (tmp_path / f'{name}.py').write_text(NETWORK)
    (tmp_path / 'your_pair.py').write_text(PAIR)
    (tmp_path / 'block.py').write_text(block)
    recipe = read_recipe(Config.fromfile('block.py').model.distillation)
    assert len(build_terms(recipe.terms))


@pytest.mark.parametrize('page', generate.BLOCKS)
def test_generated_parts_are_what_their_command_writes(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # a study's configs are named from there
    assert (ROOT / page).read_text() == generate.page(page)


def test_a_key_without_a_word_about_it_is_named():
    class Undocumented:
        """One.

        Args:
            told: what it is.
        """

        def __init__(self, told=1, untold=2):
            pass

    with pytest.raises(ValueError, match='the docstring says nothing of `untold`'):
        generate.key_table(Undocumented)


def test_messages_are_found_with_what_differs_left_out():
    code = "def f(x):\n    why = f'{x} is odd'\n    raise ValueError(f'no: {why}, ' + g(x) + '!')"
    assert list(generate.said_by(generate.ast.parse(code))) == ['no: … is odd, …!']


def test_the_commonest_messages_are_said_somewhere():
    table = (ROOT / 'docs/messages.md').read_text().partition('## All of them')[0]
    said = ' '.join(
        re.sub(r'\s+', ' ', generate.spoken(node, {}))
        for path in (ROOT / 'mmkd').rglob('*.py')
        for node in generate.ast.walk(generate.ast.parse(path.read_text()))
        if isinstance(node, (generate.ast.Constant, generate.ast.JoinedStr))
    )
    quoted = [
        quote
        for row in re.findall(r'^\| (`.*?) \|', table, re.MULTILINE)
        for quote in re.findall('`(.*?)`', row)
    ]
    parts = [p.strip() for q in quoted for p in q.split('...') if p.strip()]
    assert len(quoted) > 15
    computed = {'lacks n of m keys', 'is nan'}
    assert [p for p in parts if p not in said and p not in computed] == []


def slug(heading):
    """The anchor of a heading, as GitHub and MyST make it."""
    text = re.sub(r'\[(.*?)\]\(.*?\)', r'\1', heading).strip().lower()
    return re.sub(r'[^\w\- ]', '', text).replace(' ', '-')


def without_code(text):
    return re.sub(r'`[^`\n]+`', '', re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.M))


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_to_a_file_and_a_heading(page):
    wrong = []
    for link in re.findall(r'\]\(([^)\s]+)\)', without_code(page.read_text())):
        if '://' in link:
            continue
        name, anchor = urldefrag(link)
        path = (page.parent / name).resolve() if name else page
        text = re.sub(r'^```.*?^```$', '', path.read_text() if path.suffix == '.md' else '',
                      flags=re.DOTALL | re.M)  # fmt: skip
        headings = {slug(h) for h in re.findall(r'^#+ (.*)$', text, re.M)}
        if not path.exists() or (anchor and anchor not in headings):
            wrong.append(link)
    assert wrong == []


def test_the_readme_is_short_and_every_page_is_in_the_sites_index():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150
    index = (ROOT / 'docs/index.md').read_text()
    listed = re.findall(r'^(\w+)$', ''.join(re.findall(r'```{toctree}(.*?)```', index, re.S)), re.M)
    assert sorted([*listed, 'index']) == sorted(p.stem for p in PAGES[1:])


def commands(page):
    """The commands on a page, by line."""
    blocks = [b[2] for b in walk.BLOCK.finditer((ROOT / page).read_text()) if b[1] == 'sh']
    return [line for block in blocks for line in block.replace('\\\n', ' ').splitlines() if line]


@pytest.mark.parametrize('page', walk.WALKS)
def test_each_command_and_file_is_run_or_has_a_reason_not_to_be(page):
    run = '\n'.join(cell['source'] for cell in walk.cells(page) if cell['kind'] == 'code')
    left = walk.WALKS[page].left_out
    missed = [
        line
        for line in commands(page)
        if re.sub('  +', '  ', line) not in run and not any(line.startswith(s) for s in left)
    ]
    assert missed == [] and all(left.values())
    named = re.findall(r'^```python\n# (\w+\.py)\n', (ROOT / page).read_text(), re.M)
    assert named and all(f'%%writefile {name}\n' in run for name in named)
    python = len(re.findall(r'^```python', (ROOT / page).read_text(), re.M))
    assert python == len(named)  # a block without a name would not be run
    languages = {block[1] for block in walk.BLOCK.finditer((ROOT / page).read_text())}
    assert languages <= {'python', 'sh', 'text'}  # nor one of another language


def test_what_is_no_longer_on_a_page_is_named(monkeypatch):
    gone = walk.Walk('readme', left_out={'make coffee': 'no beans'})
    monkeypatch.setitem(walk.WALKS, 'README.md', gone)
    with pytest.raises(ValueError, match=r"README.md has nothing of \['make coffee'\]"):
        walk.cells('README.md')


def test_the_notebook_is_the_tutorial_and_was_executed():
    notebook = json.loads((ROOT / 'docs/tutorial.ipynb').read_text())
    found = [
        dict(kind=cell['cell_type'], source=''.join(cell['source'])) for cell in notebook['cells']
    ]
    assert found == walk.cells('docs/tutorial.md')
    code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
    printed = ''.join(''.join(o['text']) for cell in code for o in cell['outputs'])
    assert 'GO' in printed.split() and '(own baseline)' in printed and '/tmp' not in printed


def test_the_ten_lines_of_the_readme_are_what_new_pair_writes():
    text = (ROOT / 'README.md').read_text()
    written = new_pair.PAIR.format(
        student="'student.py'", recipe='chen2017', detector='',
        teacher='{{ fileDirname }}/teacher.py', checkpoint='{{ fileDirname }}/teacher.pth',
    )  # fmt: skip
    assert f'```python\n# my_pair.py\n{written}```' in text


@pytest.mark.slow
@pytest.mark.parametrize('page', walk.WALKS)
def test_the_commands_of_a_page_run(page):
    done = subprocess.run(
        [sys.executable, ROOT / 'docs/walk.py', page], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


class Site(HTMLParser):
    """What a built page links to and loads, and the anchors it has."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], {''}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get('id'))
        if tag == 'a' and attrs.get('href'):
            self.links.append(attrs['href'])
        loads = attrs.get('src') or (attrs.get('href') if tag == 'link' else None)
        if loads:
            self.loaded.append(loads)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    built = subprocess.run(
        [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-d', tmp_path / 'trees',
         ROOT / 'docs', tmp_path / 'site'],
        text=True, capture_output=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = {p.resolve(): Site(p) for p in (tmp_path / 'site').rglob('*.html')}
    assert len(pages) > len(PAGES)
    wrong = []
    for path, page in pages.items():
        wrong += [f'{path.name} loads {each}' for each in page.loaded if '//' in each]
        for link in [*page.links, *page.loaded]:
            if '://' in link or link.startswith(('mailto:', 'data:')):
                continue
            name, anchor = urldefrag(unquote(link))
            name = name.partition('?')[0]
            target = (path.parent / name).resolve() if name else path
            known = pages[target].anchors if target in pages else {''}
            if not target.exists() or (anchor not in known and target in pages):
                wrong.append(f'{path.name}: {link}')
    for sheet in (tmp_path / 'site').rglob('*.css'):
        wrong += re.findall(r'url\(["\']?(?:https?:)?//.*?\)|@import.*?;', sheet.read_text())
    assert wrong == []
