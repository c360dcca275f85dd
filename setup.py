"Packaging. Everything is read from settings.ini, as nbdev 2 expects."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_namespace_packages
from setuptools.command.sdist import sdist as _sdist

root = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(root/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

def requirements(kind=''):
    "The requirements of one extra, or of the library itself"
    return cfg[f'{kind}_requirements' if kind else 'requirements'].split()

extras = {k: requirements(k) for k in ('train', 'serve', 'docs', 'dev')}
extras['all'] = sorted({r for rs in extras.values() for r in rs})

class sdist(_sdist):
    "Ship settings.ini: a source distribution cannot be built without it."
    def make_distribution(self):
        self.filelist.append('settings.ini')
        super().make_distribution()

setup(
    name=cfg['repo'], version=cfg['version'], description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'].split(),
    license_expression='Apache-2.0', license_files=['LICENSE'], python_requires='>=' + cfg['min_python'],
    classifiers=['Intended Audience :: Science/Research', 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    # kernels/ and records/ stand at the top of the checkout; links in rlcr_suite/ bring them in under the package's name: of the
    # records the claims, without the evidence, which is larger than all the code
    packages=find_namespace_packages(include=['rlcr_suite*'], exclude=['rlcr_suite.records*']),
    package_data={'rlcr_suite': ['py.typed', 'records/*.json']},
    zip_safe=False, cmdclass={'sdist': sdist},
    install_requires=requirements(), extras_require=extras,
    entry_points={'console_scripts': ['rlcr-suite=rlcr_suite.cli:main'],
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
