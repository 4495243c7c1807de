"""What our pages want beyond MyST-NB, on parsed documents: nothing here edits Markdown.
Names and glossary terms in prose become links, the comments of parameters enter the
reference, and markup inside maths fails the build."""
import inspect
import re
import typing
from collections import Counter

from docutils import nodes
from fastcore.docments import docments
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

log = logging.getLogger(__name__)
CODE = (nodes.FixedTextElement, nodes.literal, nodes.math)
EVERYDAY = {'run', 'score', 'focus', 'progress'}   # terms that are ordinary words, too
TAKEN = (*CODE, nodes.title, nodes.block_quote, nodes.reference, nodes.term,
         nodes.table, pending_xref)


def lies_in(node, kinds):
    while node := node.parent:
        if isinstance(node, kinds): return True
    return False


def is_prose(node):
    "Whether a text may carry links: no heading, remark, link, table, code or formula."
    return not lies_in(node, TAKEN)


class Prose(SphinxPostTransform):
    "Runs on every page before references are resolved."
    default_priority = 1

    def run(self, **kw):
        self.page = self.env.current_document.docname
        self.refuse_markup_in_maths()
        if not self.page.startswith('reference/'): self.link_names()
        if self.page != 'docs/glossary': self.link_terms()
        self.keep_errors_with_numbers()

    def texts(self): return list(self.document.findall(nodes.Text))

    def link(self, target, shown, domain, kind):
        return pending_xref('', shown, refdomain=domain, reftype=kind, reftarget=target,
                            refdoc=self.page, refwarn=True, refexplicit=True)

    def refuse_markup_in_maths(self):
        for text in self.texts():
            maths = lies_in(text, (nodes.math, nodes.math_block))
            if maths and (found := re.search(r'\{\w+\}`|\]\(|`|<\w+|\$', text)):
                log.warning('markup "%s" in a formula', found[0], location=text.parent)
            elif is_prose(text) and re.search(r'\$\$|\\[a-z]{3,}', text):
                log.warning('a formula that is none: "%s"', text, location=text.parent)

    def link_names(self):
        known = public_names(self.env)
        for node in list(self.document.findall(nodes.literal)):
            target = known.get(node.astext().removesuffix('()'))
            if target and is_prose(node):
                shown = self.link(target, node.deepcopy(), 'py', 'obj')
                node.parent.replace(node, shown)

    def link_terms(self):
        "The first use of each glossary term leads to its definition."
        terms = {t.lower() for t in self.env.get_domain('std')._terms} - EVERYDAY
        for text in self.texts():
            while is_prose(text) and (hit := first_term(text, terms)):
                terms.remove(hit['term'].lower())
                shown = nodes.inline('', hit[0])
                term = self.link(hit['term'].lower(), shown, 'std', 'term')
                rest = nodes.Text(text[hit.end():])
                text.parent.replace(text, [nodes.Text(text[:hit.start()]), term, rest])
                text = rest

    def keep_errors_with_numbers(self):
        for text in self.texts():
            if ' ± ' in text and not lies_in(text, CODE):
                together = text.replace(' ± ', '\u00a0±\u00a0')
                text.parent.replace(text, nodes.Text(together))


def first_term(text, terms):
    "The first glossary term in a text, alone or in the plural."
    if not terms: return None
    longest_first = '|'.join(map(re.escape, sorted(terms, key=len, reverse=True)))
    return re.search(rf'(?<![\w/-])(?P<term>{longest_first})s?(?![\w-])', text, re.I)


def public_names(env):
    "`make_request`, `data.make_request`, `Faces.save` -> full name, where it is clear."
    full = [n for n in env.get_domain('py').objects if n.startswith('oneshui.')]
    parts = ((n, n.split('.')) for n in full)
    tails = [('.'.join(p[k:]), n) for n, p in parts for k in range(len(p))]
    times = Counter(tail for tail, _ in tails)
    member = lambda tail, n: '.' not in tail and n.count('.') > 2   # `save` of whom?
    return {t: n for t, n in tails if times[t] == 1 and not member(t, n)}


def comments_of(obj):
    "name -> its comment: parameters of a function or class, fields of a Spec."
    if hasattr(obj, 'model_fields'):
        source = inspect.getsource(obj)
        return dict(re.findall(r'(?m)^    (\w+):[^#\n]*# *(.+)$', source))
    try: return {k: v for k, v in docments(obj).items() if v and k != 'self'}
    except (TypeError, ValueError, OSError): return {}


def escaped(text):
    "A docstring's line as reStructuredText: outside of `code`, nothing is markup."
    plain = lambda part: re.sub(r'([\\*|_])', r'\\\1', part)
    parts = ' '.join(text.split()).split('`')
    return '`'.join(p if i % 2 else plain(p) for i, p in enumerate(parts))


def tell_parameters(app, what, name, obj, options, lines):
    "autodoc-process-docstring: prose with `code`, then what the comments say."
    lines[:] = map(escaped, lines)
    plain_class = inspect.isclass(obj) and issubclass(obj, Exception)
    if what not in ('function', 'class', 'method') or plain_class: return
    told = comments_of(obj)
    returned = told.pop('return', None)
    lines += ['', *(f':param {k}: {escaped(v)}' for k, v in told.items())]
    if returned: lines.append(f':returns: {escaped(returned)}')
    lines.append('')


def plain_types(app, obj, bound_method):
    "autodoc-before-process-signature: Annotated[float, Field(gt=0)] reads float."
    try: obj.__annotations__ = typing.get_type_hints(obj)
    except (AttributeError, NameError, TypeError): pass


def skip_what_is_told_elsewhere(app, what, name, obj, skip, options):
    "autodoc-skip-member: a module's page has what it defines, not what it hands on."
    page = app.env.current_document.docname.replace('reference/', 'oneshui.')
    home = getattr(obj, '__module__', None) or page
    elsewhere = home.startswith('oneshui.') and home != page
    return True if what == 'module' and elsewhere else None


def setup(app):
    app.setup_extension('sphinx.ext.autodoc')
    app.add_post_transform(Prose)
    app.connect('autodoc-process-docstring', tell_parameters)
    app.connect('autodoc-before-process-signature', plain_types)
    app.connect('autodoc-skip-member', skip_what_is_told_elsewhere)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
