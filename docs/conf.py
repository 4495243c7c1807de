# The documentation site: MyST-NB over the notebooks that docs/build.py has prepared. Everything that a page needs lies in the site.
from configparser import ConfigParser
from pathlib import Path

_s = ConfigParser(delimiters=['='], interpolation=None)
_s.read(Path(__file__).parent / 'settings.ini', encoding='utf-8')
_s = _s['DEFAULT']
project, author, copyright, release, language = _s['title'], _s['author'], _s['copyright'], _s['version'], 'en'
extensions = ['myst_nb', 'sphinxcontrib.katex', 'sphinxcontrib.bibtex', 'sphinx_copybutton']
html_theme, html_title, html_static_path, html_css_files = 'sphinx_book_theme', 'oneshui', ['_static'], ['oneshui.css']
html_js_files = ['page.js']
html_theme_options = dict(repository_url=_s['git_url'], repository_branch=_s['branch'], path_to_docs=_s['nbs_path'], use_repository_button=True, show_navbar_depth=1, show_toc_level=2, use_download_button=False,
                          launch_buttons=dict(binderhub_url='https://mybinder.org', colab_url='https://colab.research.google.com', notebook_interface='jupyterlab'))
html_favicon = '_static/favicon.svg'
html_context = dict(default_mode='auto')
nb_execution_mode = 'off'              # pages show the committed outputs
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['colon_fence', 'dollarmath', 'amsmath']
myst_heading_anchors = 3
bibtex_bibfiles = ['references.bib']
# KaTeX writes MathML, which browsers draw themselves: no font and no style sheet is fetched.
katex_options = 'output: "mathml"'
katex_css_path = 'oneshui.css'
