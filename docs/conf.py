"""The site: ``make docs`` builds it into build/docs, with every warning an error.

It opens from the disk, without a network: no page loads anything from elsewhere, and formulas are
MathML, which browsers typeset themselves.
"""

import re

from docutils import nodes
from docutils.utils.math import latex2mathml

project = html_title = 'mmkd'
html_theme = 'furo'
html_static_path = ['static']
html_css_files = ['site.css']
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_math_renderer = 'mathml'
extensions = ['myst_parser', 'sphinx_copybutton']
myst_enable_extensions = ['dollarmath']
# So that GitHub typesets the same formulas.
myst_fence_as_directive = ['math']
myst_heading_anchors = 4
exclude_patterns = ['static']
pygments_style = 'friendly'
pygments_dark_style = 'monokai'


def _mathml(tex, block=False):
    # Numbers of equations stand in the formulas, as on GitHub.
    return latex2mathml.tex2mathml(re.sub(r'\\qquad \((\d)\)', r'\\qquad \\text{(\1)}', tex), block)


def visit_inline(self, node):
    self.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(self, node):
    self.body.append(f'<div class="math">{_mathml(node.astext(), True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer('mathml', (visit_inline, None), (visit_block, None))
