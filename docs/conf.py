"""The documentation site: MyST-NB over what docs/build.py has laid out. Everything that
a page needs lies in the site."""
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(root / 'settings.ini', encoding='utf-8')
settings = config['DEFAULT']
project, author, release = settings['title'], settings['author'], settings['version']
copyright, language = settings['copyright'], 'en'

extensions = ['myst_nb', 'sphinxcontrib.katex', 'sphinxcontrib.bibtex',
              'sphinx_copybutton', 'sphinx.ext.autodoc', 'sphinx.ext.viewcode',
              'sphinx_codeautolink', 'pages']

# notebooks and Markdown
exclude_patterns = ['figures']     # their tables are files to read, not pages
nb_execution_mode = 'off'          # pages show the committed outputs
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = 'Show the code', 'Hide the code'
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['colon_fence', 'dollarmath', 'amsmath']
myst_dmath_double_inline = True    # a formula $$…$$ may end a paragraph
myst_heading_anchors = 3
bibtex_bibfiles = ['references.bib']

# the reference: signatures and docstrings; docs/pages.py adds the parameters' comments
autodoc_member_order = 'bysource'
autodoc_default_options = {'undoc-members': True, 'no-value': True,
                           'exclude-members': 'model_config'}
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = 'hide'
default_role = 'py:obj'            # `name` in a docstring leads to its definition
codeautolink_warn_on_missing_inventory = codeautolink_warn_on_failed_resolve = False

# KaTeX writes MathML, which browsers draw themselves: no font is fetched
katex_options = 'output: "mathml"'
katex_css_path = 'oneshui.css'

# how it looks
html_theme, html_title = 'sphinx_book_theme', 'oneshui'
html_favicon, html_static_path = '_static/favicon.svg', ['_static']
html_css_files, html_js_files = ['oneshui.css'], ['page.js']
html_context = dict(default_mode='auto')
html_copy_source = html_show_sourcelink = False
html_theme_options = dict(show_navbar_depth=1, show_toc_level=2, navbar_persistent=[],
                          use_download_button=False)   # the sidebar has the search box


def hosted_at(remote):
    "The web address of a repository that a Git remote names, or None."
    pattern = r'(?:https://|ssh://)?(?:[^@/]+@)?([\w.-]+\.\w+)[:/](.+?)(?:\.git)?/?'
    m = re.fullmatch(pattern, remote)
    return f'https://{m[1]}/{m[2]}' if m else None


# links to the repository's host: where the checkout came from, or none
ask = ['git', '-C', root, 'remote', 'get-url', 'origin']
origin = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
if repository := hosted_at(origin):
    html_theme_options |= dict(repository_url=repository, use_repository_button=True,
                               repository_branch=settings['branch'])
    if repository.startswith('https://github.com/'):
        html_theme_options['launch_buttons'] = dict(
            binderhub_url='https://mybinder.org', notebook_interface='jupyterlab',
            colab_url='https://colab.research.google.com')
