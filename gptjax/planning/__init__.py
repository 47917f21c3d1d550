"""Plans: whether a run fits, how fast it is and what it costs, computed on a machine without accelerators.

The actual train step is compiled ahead of time for absent TPUs, and its memory and collectives are read from the program. The analytic
model beside it is the only source for GPUs and for the candidates of a search.
"""

from gptjax.planning.collectives import collectives
from gptjax.planning.estimate import estimate
from gptjax.planning.memory import analytic_memory
from gptjax.planning.report import as_json, describe, draw, ranking
from gptjax.planning.roofline import roofline
from gptjax.planning.search import search
from gptjax.planning.topology import parse
from gptjax.planning.volumes import theoretical
