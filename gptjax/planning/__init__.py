"""The planning room: will it fit, how fast, at what cost; answered on a machine without accelerators.

The real train step is compiled for the named TPUs ahead of time, and its memory and collectives are read off the program;
beside it stands what theory says, which is all there is for GPUs and for the candidates of a search.
"""

from gptjax.planning.collectives import Collective, collectives
from gptjax.planning.estimate import Estimate, estimate
from gptjax.planning.memory import Memory, analytic_memory
from gptjax.planning.picture import draw
from gptjax.planning.program import Compiled, TooLarge, compile_step
from gptjax.planning.report import as_json, describe, ranking
from gptjax.planning.roofline import Roofline, roofline
from gptjax.planning.search import search
from gptjax.planning.topology import Topology, parse
from gptjax.planning.volumes import theoretical

__all__ = [
  'Collective', 'Compiled', 'Estimate', 'Memory', 'Roofline', 'TooLarge', 'Topology', 'analytic_memory', 'as_json', 'collectives',
  'compile_step', 'describe', 'draw', 'estimate', 'parse', 'ranking', 'roofline', 'search', 'theoretical',
]
