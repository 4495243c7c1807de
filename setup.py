# Project metadata lives in settings.ini, nbdev's home for it; setuptools gets it here.
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(Path(__file__).parent / 'settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
extras = ('notebooks', 'transformers', 'cluster', 'ranks', 'dev', 'docs', 'browser')
setup(name=s['lib_name'], version=s['version'], description=s['description'],
      url=s['git_url'], author=s['author'], author_email=s['author_email'],
      license=s['license'],
      packages=find_packages(include=['oneshui', 'oneshui.*']),
      package_data={'oneshui': ['assets/*', 'presets/*']},
      python_requires='>=' + s['min_python'],
      install_requires=s['requirements'].split(),
      extras_require={k: s[f'{k}_requirements'].split() for k in extras},
      entry_points={'nbdev': [f'{s["lib_name"]}={s["lib_name"]}._modidx:d'],
                    'console_scripts': s['console_scripts'].split()})
