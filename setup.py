"""The packages of a wheel: gptjax, with tools/ as gptjax.tools and configs/ as gptjax.configs. The rest is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=['gptjax*']), *(f'gptjax.{name}' for name in find_packages(include=['tools*'])), 'gptjax.configs'],
      package_dir={'gptjax.tools': 'tools', 'gptjax.configs': 'configs'},
      package_data={'gptjax.serving': ['page.html'], 'gptjax.configs': ['tasks/*'], 'gptjax.tools': ['report.*'],
                    'gptjax.tools.launch': ['*']})
