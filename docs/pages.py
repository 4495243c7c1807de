"""What our pages want beyond MyST-NB, as a Sphinx extension on parsed documents: nothing here reads or writes Markdown.
Code in prose and glossary terms become links, parameters' comments enter the reference, and markup inside maths fails the build."""
import inspect, re, typing
from collections import Counter

from docutils import nodes
from fastcore.docments import docments
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

log = logging.getLogger(__name__)
CODE = (nodes.FixedTextElement, nodes.literal, nodes.math)
TAKEN = (*CODE, nodes.title, nodes.reference, nodes.term, nodes.table, pending_xref)


def lies_in(node, kinds):
    while node := node.parent:
        if isinstance(node, kinds): return True
    return False


def is_prose(node):
    "Whether a text may carry links: no heading, link, table, code or formula."
    return not lies_in(node, TAKEN)


def link(domain, kind, target, child, page):
    ref = pending_xref('', child, refdomain=domain, reftype=kind, reftarget=target, refdoc=page, refwarn=True, refexplicit=True)
    return ref


class Prose(SphinxPostTransform):
    "Before references are resolved: `names` of the package, the first use of a glossary term, numbers with their ±."
    default_priority = 1

    def run(self, **kw):
        self.page = self.env.current_document.docname
        self.refuse_markup_in_maths()
        if not self.page.startswith('reference/'): self.link_names()
        if self.page != 'docs/glossary': self.link_terms()
        for text in list(self.document.findall(nodes.Text)):
            if ' ± ' in text and not lies_in(text, CODE): text.parent.replace(text, nodes.Text(text.replace(' ± ', '\u00a0±\u00a0')))

    def refuse_markup_in_maths(self):
        for node in self.document.findall(lambda n: isinstance(n, (nodes.math, nodes.math_block))):
            if found := re.search(r'\{\w+\}`|\]\(|`|<\w+', node.astext()):
                log.warning('markup %r inside the formula %r', found[0], node.astext()[:80], location=node, type='maths')
        for text in self.document.findall(nodes.Text):
            if is_prose(text) and re.search(r'\$\$|\\(mathcal|frac|theta|nabla|varphi)\b', text):
                log.warning('a formula was not read as one: %r', text[:80], location=text.parent, type='maths')

    def link_names(self):
        known = public_names(self.env)
        for node in list(self.document.findall(nodes.literal)):
            if is_prose(node) and (target := known.get(node.astext().removesuffix('()'))):
                node.parent.replace(node, link('py', 'obj', target, node.deepcopy(), self.page))

    def link_terms(self):
        terms = {t for t in self.env.get_domain('std')._terms if t.islower() or len(t) < 20}
        for text in list(self.document.findall(nodes.Text)):
            while terms and is_prose(text) and (hit := first_term(text, terms)):
                terms.discard(hit['term'].lower())
                a, b = hit.span()
                after = nodes.Text(text[b:])
                term = link('std', 'term', hit['term'].lower(), nodes.inline('', text[a:b]), self.page)
                text.parent.replace(text, [nodes.Text(text[:a]), term, after])
                text = after


def first_term(text, terms):
    "The first glossary term in a text, alone or in the plural."
    longest_first = '|'.join(map(re.escape, sorted(terms, key=len, reverse=True)))
    return re.search(rf'(?<![\w/-])(?P<term>{longest_first})s?(?![\w-])', text, re.I)


def public_names(env):
    "How prose may call a definition (`make_request`, `data.make_request`, `Faces.save`): its full name, where that is clear."
    full = [n for n in env.get_domain('py').objects if n.startswith('oneshui.')]
    tails = [('.'.join(n.split('.')[k:]), n) for n in full for k in range(n.count('.') + 1)]
    times = Counter(t for t, _ in tails)
    members = {t for t, n in tails if '.' not in t and n.count('.') > 2}   # `save` alone may be anything
    return {t: n for t, n in tails if times[t] == 1 and t not in members}


def comments_of(obj):
    "name -> its comment, for the parameters of a function or class and the fields of a pydantic class."
    if hasattr(obj, 'model_fields'):
        return dict(re.findall(r'(?m)^    (\w+):[^#\n]*# *(.+)$', inspect.getsource(obj)))
    try: return {k: v for k, v in docments(obj).items() if v and k != 'self'}
    except (TypeError, ValueError, OSError): return {}


def escaped(text):
    "A docstring's line as reStructuredText: outside of `code`, nothing is markup."
    parts = text.split('`')
    return '`'.join(p if i % 2 else re.sub(r'([\\*|_])', r'\\\1', p) for i, p in enumerate(parts))


def tell_parameters(app, what, name, obj, options, lines):
    "autodoc-process-docstring: our docstrings are prose with `code`; parameters are told in their comments."
    lines[:] = [escaped(l) for l in lines]
    if what not in ('function', 'class', 'method') or inspect.isclass(obj) and issubclass(obj, Exception): return
    told = comments_of(obj)
    returned = told.pop('return', None)
    lines += ['', *(f':param {k}: {escaped(" ".join(v.split()))}' for k, v in told.items())]
    if returned: lines.append(f':returns: {escaped(" ".join(returned.split()))}')
    lines.append('')


def plain_types(app, obj, bound_method):
    "autodoc-before-process-signature: Annotated[float, Field(gt=0)] reads float."
    try: obj.__annotations__ = typing.get_type_hints(obj)
    except (AttributeError, NameError, TypeError): pass


def setup(app):
    app.add_post_transform(Prose)
    app.connect('autodoc-process-docstring', tell_parameters)
    app.connect('autodoc-before-process-signature', plain_types)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
